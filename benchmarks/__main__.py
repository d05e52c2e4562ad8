"""Mining against a plain forward of the same inputs, at Qwen2-VL-2B layer shapes.

The vision tower is cut to one narrow block, so that it does not flatter the ratio. Memory is
measured in a process of its own for each workload, and only on Linux, where the kernel's record of
the largest use can be reset after the model has been built.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import miner_lens as ml

LAYERS = 4
GRID = (1, 42, 114)  # 1,197 image tokens after the 2 x 2 merge
TEXT_TOKENS = 49
VOCABULARY, IMAGE, START, END = 1024, 1000, 1001, 1002
Workload = Callable[[], object]


def build_model(dtype: torch.dtype) -> Any:
    """A random Qwen2-VL with the 2B checkpoint's decoder layers."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": 1536},
        image_token_id=IMAGE,
        video_token_id=IMAGE + 3,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    model: Any = Qwen2VLForConditionalGeneration(config)
    return model.to(dtype).eval()


def build_inputs(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One image and a question, 1,246 tokens, with the masks of its modalities."""
    generator = torch.Generator().manual_seed(0)
    frames, height, width = GRID
    image_tokens = frames * height * width // 4
    words = torch.randint(0, IMAGE, (TEXT_TOKENS - 2,), generator=generator)
    ids = torch.cat(
        [
            words[:10],
            torch.tensor([START]),
            torch.full((image_tokens,), IMAGE),
            torch.tensor([END]),
            words[10:],
        ]
    )[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(frames * height * width, 1176, generator=generator).to(dtype),
        "image_grid_thw": torch.tensor([GRID]),
    }
    layout = ml.ModalityLayout({"image": IMAGE}, frozenset({START, END}))
    return inputs, layout.masks(ids)


def workloads(dtype: torch.dtype, only: str | None = None) -> dict[str, Workload]:
    """The things that are timed, by name."""
    inputs, masks = build_inputs(dtype)
    made: dict[str, Workload] = {}
    if only in (None, "plain"):
        plain = build_model(dtype)

        def forward() -> object:
            with torch.no_grad():
                return plain(**inputs, use_cache=False, logits_to_keep=1)

        made["plain"] = forward
    if only in (None, "mine"):
        bridge = ml.wrap(build_model(dtype))
        made["mine"] = lambda: ml.mine(bridge, [(inputs, masks)], progress=False)
    return made


def time_ratio(dtype: torch.dtype, runs: int, console: Console) -> dict[str, float]:
    """Medians of both workloads, run in turn, and of the ratio pair by pair."""
    made = workloads(dtype)
    for workload in made.values():
        workload()
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in track(range(runs), description=str(dtype), console=console):
        for name, workload in made.items():
            start = time.perf_counter()
            workload()
            times[name].append(time.perf_counter() - start)
    ratios = [mine / plain for mine, plain in zip(times["mine"], times["plain"], strict=True)]
    return {
        "plain_seconds": statistics.median(times["plain"]),
        "mine_seconds": statistics.median(times["mine"]),
        "time_ratio": statistics.median(ratios),
        "time_ratio_min": min(ratios),
        "time_ratio_max": max(ratios),
    }


def peak_memory(name: str, dtype: str) -> float:
    """Largest resident memory while a process runs one workload, in MB, weights included."""
    command = [sys.executable, "-m", "benchmarks", "--peak", name, "--dtype", dtype]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


def _high_water_mark() -> float:
    """Largest resident memory of this process since it was reset, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel keeps no VmHWM")


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each workload")
    parser.add_argument("--dtype", default=None, help="float32 or bfloat16; default both")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results.json"))
    parser.add_argument("--peak", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        (workload,) = workloads(getattr(torch, options.dtype), only=options.peak).values()
        workload()
        Path("/proc/self/clear_refs").write_text("5")
        workload()
        print(_high_water_mark())
        return

    console = Console()
    results = {}
    for dtype in [options.dtype] if options.dtype else ["float32", "bfloat16"]:
        row = time_ratio(getattr(torch, dtype), options.runs, console)
        row |= {f"{name}_peak_mb": peak_memory(name, dtype) for name in ("plain", "mine")}
        results[dtype] = row
    console.print(_table(results))
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    options.out.write_text(json.dumps({"machine": machine, "mining": results}, indent=2) + "\n")


def _table(results: dict[str, dict[str, float]]) -> Table:
    table = Table(title=f"Mining against a plain forward: {LAYERS} layers of Qwen2-VL-2B, T=1,246")
    for column in ("dtype", "plain (s)", "mining (s)", "ratio (min to max)", "extra peak (MB)"):
        table.add_column(column, justify="right")
    for dtype, row in results.items():
        table.add_row(
            dtype,
            f"{row['plain_seconds']:.2f}",
            f"{row['mine_seconds']:.2f}",
            f"{row['time_ratio']:.2f} ({row['time_ratio_min']:.2f} to {row['time_ratio_max']:.2f})",
            f"{row['mine_peak_mb'] - row['plain_peak_mb']:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
