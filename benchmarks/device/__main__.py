"""``python -m benchmarks.device``."""

import sys
from importlib import import_module

if __name__ == "__main__":
    if "--simulated" in sys.argv[1:]:  # it registers a device before torch asks for one
        import_module("tests.support.simulated_gpu")
    import_module("benchmarks.device.command").app(prog_name="python -m benchmarks.device")
