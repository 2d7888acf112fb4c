"""The model card of a trained model: markdown from its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffsteer.train.recipes import PARTS, RECIPES, for_images

__all__ = ["card"]


def card(config: Mapping[str, Any], num_train: int, num_heldout: int) -> str:
    """Markdown for the model folder's README.

    Parameters
    ----------
    config : mapping
        What :func:`diffsteer.train.export.export` writes to ``config.json``.
    num_train, num_heldout : int
        Number of images that the networks were trained on, and that they have never seen.
    """
    data, metrics, recipes = config["data"], config["metrics"], config["recipe"]
    parts = [part for part in recipes if part != "seed"]
    commands = _commands(config)
    said, repeat = ("The commands", "repeat") if len(commands) > 1 else ("The command", "repeats")
    lines = [
        f"# diffsteer model: {config['name']}",
        "",
        f"A small class-conditional diffusion model of {'x'.join(map(str, config['image_shape']))} images "
        f"(DDPM, linear betas, {config['prediction']} prediction, label {config['null_label']} = unconditional) with "
        "the classifiers that judge its samples. Weights: safetensors, float16, averaged over the training.",
        "",
        "## Data",
        f"{data['name']}. Licence: {data['licence']}. {data['note']}",
        f"Every network is trained on the same {num_train} images (those called only_<label> on one class of them); "
        f"the other {num_heldout} are held out. Classes: {', '.join(config['classes'])}.",
        "",
        "## Recipe",
        f"AdamW, gradient clipping, weight averaging; every setting is in `config.json`. {said} "
        f"{', '.join(f'`{command}`' for command in commands)} with seed {recipes['seed']} {repeat} it, up to the "
        "machine's rounding.",
        "",
        *_table(
            ("part", "steps", "batch", "peak lr", "wall seconds", "device"),
            [
                (p, r["steps_done"], r["batch_size"], r["lr"], r["seconds"], r["device"])
                for p, r in recipes.items()
                if p in parts
            ],
        ),
        "",
        "## Figures",
    ]
    for part in ("judge", "features"):
        if part in metrics:
            lines.append(f"- {part}: {metrics[part]['heldout_accuracy']:.2%} of the held-out images right.")
    if "samples" in metrics:
        drawn = metrics["samples"]
        lines.append(
            f"- {drawn['number']} samples in {drawn['steps']} steps, as the judge reads them: shares of unconditional "
            "samples, and how often a conditional sample has the class that was asked for."
        )
        header = ("class", "training share", "DDIM share", "DDPM share", "DDIM agreement", "DDPM agreement")
        columns = [config["class_shares"]] + [
            drawn[sampler][figure] for figure in ("class_shares", "label_agreement") for sampler in ("ddim", "ddpm")
        ]
        rows = [(name, *(f"{c[i]:.1%}" for c in columns)) for i, name in enumerate(config["classes"])]
        lines += ["", *_table(header, rows)]
    if "denoiser" in metrics:
        loss = metrics["denoiser"]["loss"]
        header, columns = ["time step", "denoising loss, train", "held out"], [loss["train"], loss["heldout"]]
        if "noisy_classifier" in metrics:
            header += ["noisy classifier right", "its cross entropy"]
            columns += [metrics["noisy_classifier"][name] for name in ("heldout_accuracy", "heldout_cross_entropy")]
        rows = [(t, *(f"{c[i]:.3f}" for c in columns)) for i, t in enumerate(metrics["denoiser"]["timesteps"])]
        lines += ["", *_table(header, rows)]
    if "guidance" in config:
        lines += [
            "",
            "## Guidance",
            "`calibration.json` says how the posterior of dynamic negative guidance is to be read, per class, level "
            f"and kind of sampler: `diffsteer calibrate {config['name']}`, once with a stochastic scheduler (ddpm) "
            "and once with a deterministic one (any other), from unguided rollouts alone. The settings under "
            "`guidance` in `config.json` were chosen on the first half of the classes.",
        ]
    lines += [
        "",
        "## Limits",
        "For experiments with guidance methods, not for any other use. Where the held-out denoising "
        "loss exceeds the training loss, the model has begun to remember its images. A classifier that counts samples "
        "makes errors of its own: print its floor beside every share.",
        "",
    ]
    return "\n".join(lines)


def _commands(config: Mapping[str, Any]) -> list[str]:
    """How the model is trained again: one command for all parts whose recipes were changed alike."""
    dataset = config.get("dataset", config["name"])
    if dataset in RECIPES:
        images, usual = dataset, RECIPES[dataset]
        default = set(usual)
    else:
        images = f"IMAGES --image-size {config['image_shape'][-1]}"
        usual = for_images(tuple(config["image_shape"]), len(config["classes"]))
        default = set(PARTS[:4])
    alike: dict[str, list[str]] = {}
    for part, recipe in config["recipe"].items():
        if part != "seed":
            changed = [
                f" --{name.replace('_', '-')} {recipe[name]}"
                for name in ("steps", "batch_size", "lr")
                if recipe[name] != getattr(usual[part], name)
            ]
            alike.setdefault("".join(changed), []).append(part)
    return [
        "".join([
            f"diffsteer train {images}", *([] if set(parts) == default else [f" --part {part}" for part in parts]),
            changed, " --out DIR",
        ])
        for changed, parts in alike.items()
    ]  # fmt: skip


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]
