"""The command line: parses, calls, prints. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from diffsteer import __version__
from diffsteer.errors import DiffsteerError, ParameterError

app = App(
    name="diffsteer",
    version=__version__,
    help="Guidance for diffusion models: published methods, each proven against an oracle.",
    suppress_keyboard_interrupt=False,  # main() says what is kept
)
bench = App(name="bench", help="Compare methods; every command resumes where it was stopped.")
app.command(bench)

Concepts = Annotated[list[str], Parameter(name=["--concept", "-c"], negative="")]


@app.command
def remove(
    model: str = "digits",
    *,
    concept: Concepts,
    samples: int = 256,
    steps: int = 50,
    scheduler: Literal["ddpm", "ddim", "dpm++", "euler", "unipc", "heun"] = "ddpm",
    seed: int = 0,
    out: Path = Path("."),
    device: str = "cpu",
) -> None:
    """Take a concept out of what a model generates, and show what that cost.

    Compares unguided sampling, rejection, negative prompting, safe latent diffusion and dynamic negative guidance
    under the same seeds; prints a table with 95% intervals and writes report.html, samples.png, results.json and
    results.csv.

    Examples:

    diffsteer remove digits --concept 3

    diffsteer remove digits --concept 3 --concept 8 --scheduler ddim

    diffsteer remove --model path/to/your/model --concept cat

    Parameters
    ----------
    model
        A shipped model, or the folder of your own (see `diffsteer train`).
    concept
        The class to remove, by name or number; repeat for several.
    samples
        Samples per method.
    steps
        Inference steps.
    scheduler
        ddpm is stochastic; the others are deterministic.
    seed
        Sample i depends on (seed, i) alone, whatever the method.
    out
        Folder for the report.
    device
        Where the networks run, as PyTorch names it.
    """
    from diffsteer.bench.remove import remove as run

    run(model, concept, samples=samples, steps=steps, scheduler=scheduler, seed=seed, out=out, device=device)


@bench.command
def removal(
    model: str = "digits",
    *,
    tier: int = 1,
    out: Path | None = None,
    samples: int | None = None,
    concepts: int | None = None,
    method: Annotated[list[str] | None, Parameter(negative="")] = None,
    sampler: Annotated[list[str] | None, Parameter(negative="")] = None,
    separate: bool = False,
    quick: bool = False,
    device: str = "cpu",
) -> None:
    """Sweep methods' scales over half of the classes, choose, report the other half, draw fronts, compare.

    Hours: four of one core for the digits. Interrupt it at will: finished runs are kept and read back. Several
    processes share the runs under `torchrun --nproc_per_node N -m diffsteer bench removal ...`.

    Parameters
    ----------
    model
        A shipped model, or the folder of your own, calibrated for the tier's kinds of samplers (`diffsteer calibrate`).
    tier
        1: the sweep at 50 steps; of mnist also 2: more steps and ODE samplers on two classes, and of cifar10
        too 3: 1000 steps at one operating point; of mnist 4: everything, for a GPU.
    out
        Folder for runs, tables and pictures; by default runs/removal-MODEL-TIER.
    samples
        Per configuration, instead of the tier's; the classes for choosing get half of it.
    concepts
        How many of the reported classes, the first ones, instead of the tier's.
    method
        Only these: np, sld, sld-medium, dng, dng-paper, ceiling.
    sampler
        Only these of the tier's, as name:steps, such as ddpm:50 or dpm++:25.
    separate
        An unconditional network and a separate one of each concept, instead of one conditional network.
    quick
        A few samples and steps, to see that everything works.
    device
        Where the networks run, as PyTorch names it.
    """
    from dataclasses import replace

    from diffsteer import zoo
    from diffsteer.bench.sweep import among, sweep, tier_of

    chosen = tier_of(zoo.load_model(model), tier)
    if sampler:
        chosen = among(chosen, sampler)
    if quick:
        few = tuple((kind, 8) for kind, _ in chosen.samplers[:2])
        chosen = replace(chosen, samplers=few, samples=48, concepts=2, final=chosen.final and ("ddpm", 8, 48))
    if samples is not None:
        final = chosen.final and (*chosen.final[:2], chosen.final[2] * samples // chosen.samples)
        chosen = replace(chosen, samples=samples, final=final)
    if concepts is not None:
        chosen = replace(chosen, concepts=concepts)
    chosen = replace(chosen, methods=tuple(dict.fromkeys(method or chosen.methods)))
    folder = out or Path("runs") / f"removal-{Path(model).name}-{tier}"
    sweep(model, chosen, out=folder, separate=separate, device=device)


@bench.command
def prompts(
    pipeline: str = "shapes",
    *,
    out: Path | None = None,
    samples: int | None = None,
    method: Annotated[list[str] | None, Parameter(negative="")] = None,
    sampler: Annotated[list[str] | None, Parameter(negative="")] = None,
    guidance_scale: float | None = None,
    prior: float | None = None,
    clip: str = "openai/clip-vit-base-patch32",
    quick: bool = False,
    device: str = "cpu",
) -> None:
    """Run negative prompts, related and unrelated to the prompt, under every method, and count what is left.

    On "shapes" and "shapes-flow" the pictures are read exactly; on any other Stable Diffusion pipeline CLIP scores
    them. Hours on 2 cores. Interrupt it at will: finished runs are kept and read back.

    Parameters
    ----------
    pipeline
        shapes, shapes-flow, the folder of a Stable Diffusion pipeline, or its name on the Hugging Face hub; safetensors
        only.
    out
        Folder for runs, tables and the report; by default runs/prompts-PIPELINE.
    samples
        Pictures per pair, method and scale.
    method
        Only these: np, replace, sld, dng, dng-baseline, dng-late, dng-any.
    sampler
        Only these, as name:steps: ddpm:250, euler-a:30, ddim:50, dpm++:25; of a flow flow-euler:28.
    guidance_scale
        Of the prompt, for every method.
    prior
        DNG's, for every pair, without calibration. By default found by calibrating on each prompt.
    clip
        The CLIP model that scores, on the hub or in a folder.
    quick
        A few pictures and steps, to see that everything works.
    device
        Where the networks run, as PyTorch names it.
    """
    from diffsteer.bench.prompt_runs import Plan, parse_sampler
    from diffsteer.bench.prompts import bench_prompts

    given = {"samples": samples, "guidance_scale": guidance_scale, "prior": prior, "methods": method and tuple(method)}
    plan = Plan.quick() if quick else Plan()
    plan = plan.but(samplers=sampler and tuple(map(parse_sampler, sampler)), **given)
    bench_prompts(pipeline, plan, out=out or Path("runs") / f"prompts-{Path(pipeline).name}", clip=clip, device=device)


@bench.command(name="methods")
def bench_methods(
    model: str = "digits",
    *,
    out: Path = Path("runs/methods"),
    samples: int = 1000,
    steps: int = 25,
    method: Annotated[list[str] | None, Parameter(negative="")] = None,
    pages: Path | None = None,
) -> None:
    """Let every guidance method do what its paper claims on a small model: generate all classes, or leave some out.

    About an hour for the digits on 2 cores. Interrupt it at will: finished runs are kept and read back. Needs
    `pip install "diffsteer[train,pipelines]"`. What counts as a difference is made for the default number of samples.

    Parameters
    ----------
    model
        digits, or the folder of your own model of them (`diffsteer train digits`): it takes a weak network, which no
        other recipe has.
    out
        Folder for runs, table and pictures.
    samples
        Per method and scale; half as many where a class is left out.
    steps
        Of the sampler; twice as many where a class is left out.
    method
        Only these, by their short names.
    pages
        Also write a page for every method into this folder, from its docstring and what was measured.
    """
    from diffsteer.bench.catalogue import bench_methods as run
    from diffsteer.bench.pages import write_pages

    if method and pages is not None:
        raise ParameterError("pages show what was measured of every method; leave --method or --pages out")

    run(model, out=out, samples=samples, steps=steps, only=tuple(method or ()))
    if pages is not None:
        write_pages(pages, out)


@bench.command(name="energy")
def bench_energy(
    model: str = "digits",
    *,
    out: Path | None = None,
    data: str | None = None,
    samples: int | None = None,
    images: int | None = None,
    choosing: int | None = None,
    steps: int | None = None,
    task: Annotated[list[str] | None, Parameter(negative="")] = None,
    method: Annotated[list[str] | None, Parameter(negative="")] = None,
    quick: bool = False,
    device: str = "cpu",
) -> None:
    """Guide a model by an energy: to a class by an ordinary classifier, to the image behind a measurement, to a layout.

    The network that guides never judges. Scales are chosen on one half of the classes, or images, and reported on the
    other. Ten minutes for the digits on one core, an hour for mnist. Interrupt it at will: finished runs are kept and
    read back.

    Parameters
    ----------
    model
        A shipped model, or the folder of your own. shapes, the text-to-image pipeline, is shown a painted patch, which
        the shape that its prompt names is to cover.
    out
        Folder for runs, tables and pictures; by default runs/energy-MODEL.
    data
        The data that the model was trained on, as in `diffsteer train`; by default what the model says.
    samples
        Reported of labels.
    images
        Reported of each inverse problem.
    choosing
        Samples, or images, by which each scale is chosen.
    steps
        Of the ancestral sampler.
    task
        Only these: labels, inpainting, deblurring, super-resolution.
    method
        Only these, by their short names.
    quick
        A few samples and steps, to see that everything works.
    device
        Where the networks run, as PyTorch names it.
    """
    from diffsteer.bench.energy import Plan
    from diffsteer.bench.energy import bench_energy as run

    plan = Plan.quick() if quick else Plan()
    given = {"samples": samples, "images": images, "choosing": choosing, "steps": steps}
    plan = plan.but(tasks=task and tuple(task), methods=method and tuple(method), **given)
    run(model, plan, out=out or Path("runs") / f"energy-{Path(model).name}", data=data, device=device)


@app.command
def train(
    dataset: str = "digits",
    *,
    out: Path | None = None,
    part: Annotated[list[str] | None, Parameter(negative="")] = None,
    seed: int = 0,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    image_size: int = 32,
    resume: bool = True,
) -> None:
    """Train a model: a conditional denoiser, a judge, a feature network and a noise-aware classifier.

    `diffsteer train shapes` trains a tiny text-to-image pipeline on drawings instead, `diffsteer train shapes-lcm`
    distils the shipped one into a student that draws in one to eight steps, and `diffsteer train shapes-flow` trains a
    flow transformer, a tiny Stable Diffusion 3, beside it.

    A killed run resumes to the same weights as an uninterrupted one. Needs `pip install "diffsteer[train]"`, for the
    three pipelines `"diffsteer[train,pipelines]"`.

    Parameters
    ----------
    dataset
        digits, shapes, shapes-lcm, shapes-flow, mnist, cifar10 (from $DIFFSTEER_DATA/DATASET or the Hugging Face hub),
        or a folder of your own with one sub-folder of images per class.
    out
        The model's folder, by default runs/DATASET; pass it to `diffsteer remove --model`.
    part
        Only these: denoiser, marginal (its second stage, which makes its branch without a label the mixture of the
        labelled ones, and takes its place), weak (its twin), judge, features, noisy_classifier, unconditional,
        only_LABEL (a class).
    seed
        Of the initial weights and every batch.
    steps
        Instead of the recipe's.
    batch_size
        Instead of the recipe's.
    lr
        Learning rate, instead of the recipe's.
    image_size
        Pixels to which the images of your own folder are resized.
    resume
        Go on from the last checkpoint.
    """
    from diffsteer import zoo

    folder = out or Path("runs") / Path(dataset).name
    if dataset in zoo.PIPELINES:
        if part:
            raise ParameterError(f"{dataset} is a pipeline, which is trained whole; leave --part out")
        zoo.require_transformers()
        from diffsteer.train.flow import train_flow
        from diffsteer.train.shapes import train_shapes
        from diffsteer.train.students import train_student

        train_pipeline = {"shapes": train_shapes, "shapes-lcm": train_student, "shapes-flow": train_flow}[dataset]
        train_pipeline(folder, seed=seed, steps=steps, batch_size=batch_size, lr=lr, resume=resume)
        return
    from diffsteer.train import train as run

    run(
        dataset, folder, parts=part, seed=seed, steps=steps, batch_size=batch_size, lr=lr, image_size=image_size,
        resume=resume,
    )  # fmt: skip


@app.command
def generate(
    prompt: str,
    *,
    pipeline: str,
    negative: str = "",
    method: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    num: int = 4,
    batch_size: int = 4,
    size: Annotated[tuple[int, int] | None, Parameter(negative="")] = None,
    compare: bool = True,
    calibrate: int | None = None,
    out: Path = Path("generated"),
    device: str = "cpu",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> None:
    """Generate pictures with a diffusers pipeline under any method, beside the usual negative prompt.

    Needs `pip install "diffsteer[pipelines]"`. Writes PNGs, a contact sheet under the same seeds, the trace of the
    posterior and the run record.

    Parameters
    ----------
    prompt
        What to draw.
    pipeline
        shapes, its twin by flow matching shapes-flow, its few-step student shapes-lcm, the folder of a pipeline, or its
        name on the Hugging Face hub; safetensors only.
    negative
        What not to draw; several separated by |.
    method
        Terms joined by +: a name of `diffsteer methods`, then : and values, such as cfg:7.5+dng:2,prior=0.01; by
        default cfg:7.5, with a negative cfg:7.5+dng:1,prior=0.01; on shapes cfg:1.5 and cfg:1.5+dng:15,late=1; on
        shapes-flow cfg:2.5 and cfg:2.5+dng:30,late=1; on shapes-lcm, with a negative, nasa:0.8.
    steps
        Inference steps of the pipeline's own scheduler; by default 30, and 4 of shapes-lcm, which has 8 at most.
    seed
        Picture i depends on (seed, i) alone.
    num
        How many pictures.
    batch_size
        How many at a time.
    size
        Width and height in pixels; default: the pipeline's.
    compare
        Also the usual negative prompt and none at all, under the same seeds.
    calibrate
        Calibrate DNG first, on this many pictures of the prompt: how often they show the negative, which becomes the
        prior, and how the posterior is to be read. Networks need it, or their posterior hardly moves. By default 128 on
        shapes and shapes-flow, elsewhere 0.
    out
        Folder for the pictures.
    device
        Where the networks run, as PyTorch names it.
    dtype
        Their precision.
    """
    from diffsteer.generate import generate as run

    run(
        prompt, pipeline=pipeline, negative=negative, method=method, steps=steps, seed=seed, num=num,
        batch_size=batch_size, size=size, compare=compare, calibrate=calibrate, out=out, device=device, dtype=dtype,
    )  # fmt: skip


@app.command
def calibrate(
    model: str = "digits",
    *,
    scheduler: Literal["ddpm", "ddim", "dpm++", "euler", "unipc", "heun"] = "ddpm",
    steps: int = 50,
    rollouts: int = 1000,
    seed: int = 10,
    separate: bool = False,
    device: str = "cpu",
) -> None:
    """Fit how DNG's posterior is to be read on a model, for all its classes, and keep it in the model's folder.

    Rollouts of the model alone: no data, no classifier. Once for stochastic samplers (ddpm), once for deterministic
    ones (any other); `diffsteer remove` uses what it finds, and calibrates on the spot where it finds nothing.

    Parameters
    ----------
    model
        A shipped model, or the folder of your own.
    scheduler
        The sampler to calibrate for.
    steps
        Its steps.
    rollouts
        Unguided samples.
    seed
        Of the rollouts.
    separate
        The unconditional network and the separate ones of one class each, instead of the conditional network.
    device
        Where the networks run, as PyTorch names it.
    """
    from diffsteer import zoo
    from diffsteer.bench.removal import calibrate_model

    loaded = zoo.load_model(model, device=device)
    path = calibrate_model(
        loaded, scheduler, steps=steps, rollouts=rollouts, seed=seed, separate=separate, progress=True
    )
    print(path)


@app.command
def methods() -> None:
    """List the methods; those for optimize_latents() last.

    Each with its paper, its cost in network evaluations per step, what it takes (contexts and other networks;
    parameters without a default end in =) and where it runs, all with its defaults. By pipeline and scheduler, as
    measured: docs/guide/pipelines.md.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from diffsteer.methods import entry, list_methods, list_optimizers

    table = Table(box=SIMPLE_HEAD, row_styles=["", "dim"])
    for head in ("name", "method", "paper", "cost", "takes", "runs in"):
        table.add_column(head, no_wrap=head == "name", overflow="fold")
    for name in (*list_methods(), *list_optimizers()):
        found = entry(name)
        table.add_row(name, found.title, found.paper, f"{found.nfe:g}", ", ".join(found.takes), found.where)
    Console().print(table)


@app.command
def cite(*names: str) -> None:
    """Print BibTeX for methods by their short names, such as `diffsteer cite dng`."""
    from diffsteer.methods import cite as bibtex

    print(bibtex(*names))


def main() -> None:
    """Entry point: errors that we raise on purpose end in one readable line, Ctrl-C in none."""
    try:
        app()
    except DiffsteerError as error:
        print(f"diffsteer: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        said = str(stop) or "nothing half-written was left; finished runs of a benchmark are kept"
        print(f"diffsteer: interrupted: {said}", file=sys.stderr)
        raise SystemExit(130) from None
