"""The commands and their flags; each command's work is in the module named after it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from curvalg.cli.report import BAD_INPUT, FAILED, PARTIAL, Report, stdout

if TYPE_CHECKING:  # importing it would import NumPy and SciPy for every command
    from curvalg.cli.run_eigs import End
    from curvalg.estimate import Result

app = typer.Typer(
    help="Curvature of neural networks: list terms, read expressions of them, compute eigenvalues, densities and traces.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Which(StrEnum):
    """The end of the spectrum, by the names of :func:`curvalg.estimate.eigsh`."""

    LA = "LA"
    SA = "SA"
    LM = "LM"
    BE = "BE"

    @property
    def end(self) -> End:
        """The end in the words that the eigensolver takes."""
        return self.value


Expression = Annotated[str, typer.Argument(metavar="EXPR", help='An expression, such as "ggn + 1e-3 * identity".')]
ProblemName = Annotated[
    str,
    typer.Option(
        "--problem",
        "-p",
        metavar="NAME",
        help="digits, digits-cnn, or your own as module:function (a function that returns a curvalg.Problem; "
        "looked for in the current folder first). Its only argument may be group, the process group under torchrun.",
    ),
]


Seed = Annotated[int, typer.Option(min=0, help="Seed of random vectors.")]
CheckpointFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the run to this file now and then, and go on from it if it is there."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from curvalg import __version__

        typer.echo(f"curvalg {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show the full traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    context.obj = Report(show_traceback, context.obj)


@app.command()
def terms(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Describe this term alone.")] = None,
) -> None:
    """List the terms that expressions are made of, with their options and where they come from."""
    from curvalg import registry
    from curvalg.cli.list_terms import terms_table

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        if name is not None:
            typer.echo(registry.describe(name))
        else:
            console = stdout()
            console.print(terms_table(console.width))


@app.command()
def explain(context: typer.Context, expression: Expression, problem: ProblemName) -> None:
    """Show how an expression is read, and what it becomes on a problem."""
    from curvalg import parse
    from curvalg.cli.load import load_problem

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        expr = parse(expression)
        with report.progress(f"loading {problem}"):
            op = expr.lower(load_problem(problem, report.group))
    with report.exits(FAILED):
        typer.echo(f"{expr.tree()}\n\n{op.explain()}")


class PlanShard(StrEnum):
    """What is dealt out over ranks besides the data, by the names of :meth:`curvalg.CurvatureOperator.plan`."""

    data = "data"
    parameters = "parameters"


@app.command()
def plan(
    context: typer.Context,
    expression: Expression,
    problem: ProblemName,
    ranks: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    device_memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Memory of a rank, such as 80e9, 80GB or 80GiB.")
    ] = None,
    shard: Annotated[
        PlanShard | None,
        typer.Option(help="Deal out the data alone, or the parameters as well; by default what the memory asks for."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a Lanczos run.")] = 100,
    columns: Annotated[int, typer.Option(min=1, help="Vectors of a product.")] = 1,
    flops: Annotated[float | None, typer.Option(help="FLOPs a second that a rank sustains.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Bytes a second of a link between ranks.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what products take on many ranks, memory, traffic, work and time, without computing any."""
    from curvalg import parse
    from curvalg.cli import show_plan as command
    from curvalg.cli.load import load_problem

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        expr = parse(expression)
        with report.progress(f"loading {problem}"):
            op = expr.lower(load_problem(problem, report.group))
    with report.exits(FAILED):
        found = op.plan(
            ranks,
            device_memory,
            shard=None if shard is None else shard.value,
            steps=steps,
            columns=columns,
            flops=flops,
            bandwidth=bandwidth,
        )
        if as_json:
            typer.echo(found.as_json())
        else:
            stdout().print(command.table(found, problem))


@app.command()
def eigs(
    context: typer.Context,
    expression: Expression,
    problem: ProblemName,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Number of eigenvalues.")] = 6,
    which: Annotated[
        Which,
        typer.Option(help="Largest (LA), smallest (SA), largest in magnitude (LM), or half from each end (BE)."),
    ] = Which.LA,
    tol: Annotated[float, typer.Option(min=0.0, help="Relative tolerance; 0: machine precision.")] = 1e-4,
    seed: Seed = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the eigenvalues and the parameters of their eigenvectors (png, pdf, svg)."
        ),
    ] = None,
    checkpoint: CheckpointFile = None,
    as_json: AsJson = False,
) -> None:
    """Compute eigenvalues of a symmetric expression on a problem, each with its true residual."""
    from curvalg import parse
    from curvalg.cli import run_eigs as command
    from curvalg.cli.load import load_problem

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        expr = parse(expression)
        if plot is not None and report.writes:
            from curvalg.cli.figures import check_path

            check_path(plot)
        with report.progress(f"loading {problem}"):
            op = expr.lower(load_problem(problem, report.group))
    with report.exits(FAILED):
        options = {
            "which": which.end,
            "tol": tol,
            "seed": seed,
            "checkpoint": checkpoint,
            "progress": report.on_terminal,
        }
        pairs = command.solve(op, k, **options)  # type: ignore[arg-type]
        if as_json:
            typer.echo(command.as_json(op, pairs, problem=problem, which=which.value, tol=tol, seed=seed))
        else:
            stdout().print(command.table(op, pairs, problem))
        if plot is not None:
            from curvalg.cli.figures import draw_pairs

            figure = draw_pairs(op, pairs, problem, which.value)
            if report.writes:
                figure.savefig(plot)
            if not as_json:
                typer.echo(f"picture: {plot}")
    _finish(pairs)


class DensityAxis(StrEnum):
    """The axis of a density."""

    linear = "linear"
    log = "log"


@app.command()
def density(
    context: typer.Context,
    expression: Expression,
    problem: ProblemName,
    probes: Annotated[int, typer.Option(min=1, help="Number of random vectors.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Lanczos steps of each random vector.")] = 50,
    scale: Annotated[
        DensityAxis, typer.Option(help="The axis: λ, or |λ| on a logarithmic scale.")
    ] = DensityAxis.linear,
    outliers: Annotated[int, typer.Option(min=0, help="Eigenvalues of largest magnitude to compute first.")] = 0,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the density (png, pdf, svg).")] = None,
    checkpoint: CheckpointFile = None,
    as_json: AsJson = False,
) -> None:
    """Compute the density of the eigenvalues of a symmetric expression, by stochastic Lanczos quadrature."""
    from curvalg import parse
    from curvalg.cli import run_density as command
    from curvalg.cli.load import load_problem
    from curvalg.estimate import spectral_density

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        expr = parse(expression)
        if plot is not None and report.writes:
            from curvalg.cli.figures import check_path

            check_path(plot)
        with report.progress(f"loading {problem}"):
            op = expr.lower(load_problem(problem, report.group))
    with report.exits(FAILED):
        found = spectral_density(
            op,
            probes=probes,
            steps=steps,
            scale=scale.value,
            outliers=outliers,
            seed=seed,
            checkpoint=checkpoint,
            progress=report.on_terminal,
        )
        if as_json:
            typer.echo(command.as_json(op, found, problem=problem, seed=seed))
        else:
            stdout().print(command.table(op, found, problem))
        if plot is not None:
            from curvalg.cli.figures import draw_density

            figure = draw_density(op, found, problem)
            if report.writes:
                figure.savefig(plot)
            if not as_json:
                typer.echo(f"picture: {plot}")
    _finish(found)


@app.command()
def estimate(
    context: typer.Context,
    quantity: Annotated[
        str,
        typer.Argument(
            metavar="QUANTITY", help="trace, norm, logdet, effective-dimension or tic (EXPR is its Hessian)."
        ),
    ],
    expression: Expression,
    problem: ProblemName,
    products: Annotated[
        int | None, typer.Option(min=1, help="Largest number of products; with --tol that of the first attempt.")
    ] = None,
    tol: Annotated[float | None, typer.Option(min=0.0, help="Standard error allowed, relative to the value.")] = None,
    damping: Annotated[float | None, typer.Option(min=0.0, help="Damping λ of effective-dimension and tic.")] = None,
    seed: Seed = 0,
    checkpoint: CheckpointFile = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a number such as the trace of an expression on a problem, with its standard error."""
    from curvalg import parse
    from curvalg.cli import run_estimate as command
    from curvalg.cli.load import load_problem
    from curvalg.registry.spec import did_you_mean

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        if quantity not in command.QUANTITIES:
            from curvalg.errors import ExpressionError

            hint, known = did_you_mean(quantity, command.QUANTITIES), ", ".join(command.QUANTITIES)
            raise ExpressionError(f"unknown quantity {quantity!r}{hint}; known are {known}")
        expr = parse(expression)
        with report.progress(f"loading {problem}"):
            loaded = load_problem(problem, report.group)
    with report.exits(FAILED):
        asked = command.Asked(products, tol, seed, checkpoint, report.on_terminal, damping)
        result = command.QUANTITIES[quantity](expr, loaded, asked)
        if as_json:
            typer.echo(command.as_json(result, quantity, str(expr), problem))
        else:
            stdout().print(command.line(result, quantity, str(expr), problem))
    _finish(result)


def _finish(result: Result) -> None:
    if result.partial:
        raise typer.Exit(PARTIAL)
