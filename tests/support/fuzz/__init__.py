"""The fuzz tests' grammar of problems and the dense matrices of what it draws."""
