"""The exact engine, one rewrite after the other: time, memory, arithmetic and error of each, in one run.

    python -m bench.ladder [--rounds N] [--size H W] [--out FILE.json]

Each step adds one of `detr_fast.ops.REWRITES` to those before it; all run DETR-R50 panoptic with the same weights, and
the panoptic merge of the kept queries. The steps take turns, so that a machine's moods hit all of them; the best of the
rounds counts. Errors are against the plain model in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import cases, measure
from detr_fast import ops, reference
from detr_fast.checkpoint import save_model
from detr_fast.postprocess import panoptic_merge

TARGET = cases.REAL.target  # the photograph's, whose segmentation is written


@dataclass(frozen=True)
class Step:
    name: str
    rewrites: tuple[str, ...]  # of `ops.REWRITES`, on
    kept: int | None = cases.KEPT  # queries whose masks are computed; None: all
    fast_merge: bool = False
    dtype: torch.dtype = torch.float32

    def rules(self) -> AbstractContextManager[None]:
        off = [name for name in ops.REWRITES if name not in self.rewrites]
        return ops.plain(*off) if off else nullcontext()


def ladder() -> list[Step]:
    adds = {
        "splits": "mask_head",
        "sub-pixel": "upsample_conv",
        "folded": "backbone",
        "channels_last": "channels_last",
        "projections": "transformer",
        "caches": "cache",
    }
    steps, on = [Step("plain", (), kept=None), Step("pruned", ())], ()
    for name, rewrite in adds.items():
        on = (*on, rewrite)
        steps.append(Step(name, on))
    steps.append(Step("merge", on, fast_merge=True))
    steps.append(Step("bf16", on, fast_merge=True, dtype=torch.bfloat16))
    return steps


class Panoptic:
    """The panoptic forward of one step and the corrected merge of its kept queries, on one image."""

    def __init__(self, model: nn.Module, image: Tensor):
        self.model, self.image = model, image
        self.kept = cases.keep(cases.KEPT)(torch.empty(1, model.config.num_queries, 1))[0]

    def forward(self, step: Step) -> dict[str, Any]:
        with torch.inference_mode(), step.rules():
            return self.model(self.image, None if step.kept is None else cases.keep(step.kept), step.dtype)

    def masks(self, out: dict[str, Any]) -> Tensor:
        """The kept queries' [K,h,w]."""
        masks = out["pred_masks"]
        return masks[0] if isinstance(masks, list) else masks[0][self.kept]

    def run(self, step: Step) -> Tensor:
        out = self.forward(step)
        scores, labels = out["pred_logits"][0, self.kept].softmax(-1)[:, :-1].max(-1)
        masks, size = self.masks(out), (self.image.shape[-2], self.image.shape[-1])
        with torch.inference_mode():
            if not step.fast_merge:
                things = torch.arange(out["pred_logits"].shape[-1]) <= 90
                return reference.panoptic_merge(masks, labels, things, size, size, TARGET, merge_for_good=True).ids
            sizes = {"padded_size": size, "processed_size": size, "target_size": TARGET}
            return panoptic_merge(masks, scores, labels, **sizes, isthing=lambda label: label <= 90)[0]

    def truth(self) -> dict[str, Tensor]:
        self.model.double()
        with torch.inference_mode(), ops.plain():
            out = self.model(self.image.double(), cases.keep(cases.KEPT))
        self.model.float()
        return self.outputs(out)

    def outputs(self, out: dict[str, Any]) -> dict[str, Tensor]:
        return {"logits": out["pred_logits"], "boxes": out["pred_boxes"], "masks": self.masks(out)}


def transformers_model(model: nn.Module) -> nn.Module | None:
    """transformers' DETR with the same weights; None where transformers is not installed."""
    try:
        from transformers import DetrForSegmentation
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder, dialect="transformers")
        return DetrForSegmentation.from_pretrained(folder).eval()


def measured(panoptic: Panoptic, step: Step, truth: dict[str, Tensor]) -> dict[str, Any]:
    """All but the time, on a first call: what it keeps for later ones counts in its memory."""
    memory = measure.peak_extra_bytes(lambda: panoptic.run(step))
    out = panoptic.outputs(panoptic.forward(step))
    return {
        "peak_mib": memory / 2**20,
        "gmac": measure.gmac(lambda: panoptic.forward(step)),
        "error": errors(out, truth),
    }


def errors(out: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: (out[name] - exact).abs().max().item() for name, exact in truth.items()}


def mask_head_gmac(model: nn.Module, size: tuple[int, int]) -> float:
    image = cases.images(1, size)
    with torch.inference_mode():
        whole = measure.gmac(lambda: model(image, cases.keep(cases.KEPT)))
        return whole - measure.gmac(lambda: model.detr(image))


def taking_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            samples[name].append(measure.seconds(call))
            print(f"round {number + 1}/{rounds}  {samples[name][-1]:8.3f} s  {name}", file=sys.stderr, flush=True)
    return samples


def run(rounds: int, size: tuple[int, int]) -> dict[str, Any]:
    """Everything the table shows, with every sample."""
    model, image = cases.panoptic_model(), cases.images(1, size)
    panoptic, steps = Panoptic(model, image), ladder()
    truth = panoptic.truth()
    rows: dict[str, dict[str, Any]] = {step.name: measured(panoptic, step, truth) for step in steps}
    result = {
        "machine": measure.machine(),
        "size": list(size),
        "target": list(TARGET),
        "kept": cases.KEPT,
        "mask_head_gmac": {f"{h}x{w}": mask_head_gmac(model, (h, w)) for h, w in (cases.TYPICAL, cases.DOUBLING)},
        "batch_4_peak_mib": batch_peak(model),
        "rows": rows,
    }
    calls: dict[str, Callable[[], Any]] = {step.name: lambda step=step: panoptic.run(step) for step in steps}
    ours = Step("all masks", tuple(ops.REWRITES), kept=None)
    calls["plain, all masks"] = lambda: panoptic.forward(steps[0])
    calls["ours, all masks"] = lambda: panoptic.forward(ours)
    calls["ours, detection"] = inference(lambda: model.detr(image))
    theirs = transformers_model(model)
    if theirs is not None:
        calls["transformers"] = inference(lambda: theirs(image))
        calls["transformers, detection"] = inference(lambda: theirs.detr(image))
        out = calls["transformers"]()
        kept = {"logits": out.logits, "boxes": out.pred_boxes, "masks": out.pred_masks[0][panoptic.kept]}
        rows["transformers"] = {"error": errors(kept, truth), "version": metadata.version("transformers")}
    for name, samples in taking_turns(calls, rounds).items():
        rows.setdefault(name, {})["seconds"] = samples
    return result


def batch_peak(model: nn.Module) -> float:
    """MiB that a panoptic forward of four of the largest images needs."""
    batch = cases.images(4, cases.LARGEST)
    return measure.peak_extra_bytes(inference(lambda: model(batch, cases.keep(cases.KEPT)))) / 2**20


def inference(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return call()

    return run


def table(result: dict[str, Any]) -> str:
    """The README's table, in Markdown."""
    rows, machine = result["rows"], result["machine"]
    best = {name: min(row["seconds"]) for name, row in rows.items()}
    theirs = best.get("transformers")
    height, width = result["size"]
    lines = [
        f"DETR-R50 panoptic at {height} x {width}, {result['kept']} of 100 queries kept, with the panoptic merge, on "
        f"{machine['cores']} cores of an {machine['cpu']} (torch {machine['torch']}, {machine['threads']} threads; "
        f"commit {machine['commit'][:10]}); best of {len(rows['plain']['seconds'])} rounds:",
        "",
        "| step | s | x plain | x transformers | peak MiB | GMAC | max error: logits | boxes | masks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if "error" not in row:
            continue
        label = name if name != "transformers" else f"transformers {row['version']}"
        versus = f"{theirs / best[name]:.1f}" if theirs else ""
        peak, gmac = (f"{row[key]:.0f}" if key in row else "" for key in ("peak_mib", "gmac"))
        error = " | ".join(f"{row['error'][key]:.1e}" for key in ("logits", "boxes", "masks"))
        lines.append(
            f"| {label} | {best[name]:.2f} | {best['plain'] / best[name]:.1f} | {versus} | {peak} | {gmac} | {error} |"
        )
    lines += ["", f"All 100 masks, without the merge: plain {best['plain, all masks']:.2f} s, ours "]
    lines[-1] += f"{best['ours, all masks']:.2f} s ({best['plain, all masks'] / best['ours, all masks']:.1f} x). "
    if theirs:
        ratio = best["transformers, detection"] / best["ours, detection"]
        lines[-1] += f"Detection only: transformers {best['transformers, detection']:.2f} s, ours "
        lines[-1] += f"{best['ours, detection']:.2f} s ({ratio:.1f} x). "
    heads = ", ".join(f"{value:.1f} GMAC at {size}" for size, value in result["mask_head_gmac"].items())
    lines[-1] += f"The mask head alone: {heads}. "
    lines[-1] += f"Four images of 800 x 1333 at once need {result['batch_4_peak_mib']:.0f} MiB."
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ladder", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each step is timed (default 5)")
    parser.add_argument("--size", type=int, nargs=2, default=cases.TYPICAL, metavar=("H", "W"))
    parser.add_argument("--out", type=Path, help="write every sample to this JSON file")
    parser.add_argument("--show", type=Path, help="measure nothing: print the table of this JSON file")
    arguments = parser.parse_args()
    if arguments.show:
        print(table(json.loads(arguments.show.read_text())))
        return
    result = run(arguments.rounds, (arguments.size[0], arguments.size[1]))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
