"""Memory and time that loading the text encoder takes, against transformers' own `T5EncoderModel.from_pretrained`.

Random weights in the sizes of flan-t5-xl, in a Hugging Face folder with one fp16 file. Each loading runs in a fresh
process, the two ways in turn, and encodes one prompt of 20 tokens, as a way may leave reading weights for later.
Memory is the highest resident memory (VmHWM of /proc/self/status, so Linux alone) less what the imports hold.

    python benchmarks/load_text_encoder.py
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "core")]

from test_text_encoder_full_size import Loading, measure, random_weights, save_full_size_folder  # noqa: E402

WAYS = ("load_text_encoder", "from_pretrained")
DTYPES = ("float32", "float16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryDirectory() as work:
        folder = save_full_size_folder(Path(work) / "flan", random_weights())
        file_size = (folder / "model.safetensors").stat().st_size
        print(f"fp16 file of {file_size / 1e9:.3f} GB, {options.threads} thread(s), medians of {options.repeats}")
        print("to | way | load s | prompt s | CPU s | weights GB | peak of loading GB | peak with prompt GB | of the file")
        for dtype in DTYPES:
            compare(folder, dtype, options.repeats, file_size)


def compare(folder: Path, dtype: str, repeats: int, file_size: int) -> None:
    """Print a row for each way and their ratio."""
    loadings: dict[str, list[Loading]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            loadings[way].append(measure(way, folder, dtype))
    rows = {way: Loading(*map(statistics.median, zip(*found, strict=True))) for way, found in loadings.items()}
    for way, row in rows.items():
        print(f"{dtype} | {way} | {row.load_s:.1f} | {row.prompt_s:.1f} | {row.cpu_s:.1f} | {row.weights / 1e9:.2f} | "
              f"{row.load_peak / 1e9:.2f} | {row.peak / 1e9:.2f} | {row.peak / file_size:.2f}")
    ours, theirs = (rows[way] for way in WAYS)
    seconds = (ours.load_s + ours.prompt_s) / (theirs.load_s + theirs.prompt_s)
    print(f"{dtype} | ratio: peak with prompt {ours.peak / theirs.peak:.2f}, load and prompt s {seconds:.2f}, "
          f"CPU s {ours.cpu_s / theirs.cpu_s:.2f}", flush=True)


if __name__ == "__main__":
    main()
