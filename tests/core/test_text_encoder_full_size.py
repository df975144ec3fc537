"""ELLA's text encoder at its full size: every layout gives the features of transformers' own T5EncoderModel.

Random weights in the sizes of flan-t5-xl, 2.4 GB in fp16. Takes minutes, 10 GB of memory and 6 GB of disk.
"""

import ctypes
import gc
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from small_t5 import assert_close, save_folder, save_sharded, save_single, save_tokenizer
from transformers import T5Config, T5EncoderModel

from emma_core.text.encoder import load_text_encoder
from emma_core.text.t5_file import open_t5_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocab_size": 32128, "d_model": 2048, "d_kv": 64, "num_heads": 32, "d_ff": 5120, "num_layers": 24}
CONFIG = {**SIZES, "model_type": "t5", "feed_forward_proj": "gated-gelu"}
WORDS = ["<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(3, 32100))]
IDS = [*torch.randint(3, 32100, (20,), generator=torch.Generator().manual_seed(1)).tolist(), 1]
PROMPT = " ".join(WORDS[index] for index in IDS[:-1])
TOLERANCE = 1e-4  # of the largest feature

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")

_CHILD = """
import json, sys, time
import torch
from transformers import T5Config, T5EncoderModel
from emma_core.text.t5_file import load_t5_parts, open_t5_file
from emma_core.text.encoder import load_text_encoder

def weights_alone(path, dtype):
    t5_file = open_t5_file(path)
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**vars(t5_file.config), feed_forward_proj="gated-gelu"))
    load_t5_parts(model, t5_file, dtype)
    model.set_input_embeddings(model.shared)
    return model

def resident(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

ways = {
    "load_text_encoder": lambda path, dtype: load_text_encoder(path, dtype).model,
    "load_parts": weights_alone,
    "from_pretrained": lambda path, dtype: T5EncoderModel.from_pretrained(path, torch_dtype=dtype),
}
way, path, dtype = sys.argv[1:]
before = resident("VmRSS")
cpu_started, started = time.process_time(), time.perf_counter()
model = ways[way](path, getattr(torch, dtype))
loaded = time.perf_counter()
load_peak = resident("VmHWM") - before
with torch.no_grad():
    model(input_ids=torch.arange(3, 23)[None])
print(json.dumps({
    "load_s": loaded - started, "prompt_s": time.perf_counter() - loaded,
    "cpu_s": time.process_time() - cpu_started, "load_peak": load_peak, "peak": resident("VmHWM") - before,
    "weights": sum(weight.nbytes for weight in model.parameters()),
}))
"""


class Loading(NamedTuple):
    """What loading took in a fresh process, beyond what its imports hold: seconds, and bytes of resident memory."""

    load_s: float
    prompt_s: float
    cpu_s: float  # of both, in all threads
    load_peak: int
    peak: int  # of loading and a first prompt of 20 tokens
    weights: int


def measure(way: str, path: Path, dtype: str) -> Loading:
    """Load by ``way`` (see ``ways`` above) in a fresh process, as the memory of this one would count there too."""
    command = [sys.executable, "-c", _CHILD, way, str(path), dtype]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    return Loading(**json.loads(finished.stdout.splitlines()[-1]))


def random_weights() -> dict[str, torch.Tensor]:
    """Weights under which attention and feed-forward layers both matter at every depth, fp16."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes_of_transformers().items():
        noise = torch.randn(shape, generator=generator)
        if key.endswith("layer_norm.weight"):
            noise.mul_(0.2).add_(1)
        elif key.endswith("relative_attention_bias.weight"):
            noise *= 0.5
        elif key != "shared.weight":
            # T5 does not scale its attention scores: small queries do.
            noise *= (shape[1] * (SIZES["d_kv"] if key.endswith("q.weight") else 1)) ** -0.5
        state[key] = noise.half()
    return state


def shapes_of_transformers() -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**CONFIG))
    return {key: value.shape for key, value in model.state_dict().items() if key != "encoder.embed_tokens.weight"}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save_full_size_folder(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """A Hugging Face folder with config.json and a tokenizer of 32,100 words."""
    save_folder(folder, state, CONFIG)
    save_tokenizer(folder / "tokenizer.json", WORDS)
    return folder


def save_full_size_file(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    path = save_single(folder, state)
    save_tokenizer(folder / "t5.tokenizer.json", WORDS)
    return path


def features_by_transformers(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([IDS])).last_hidden_state,
            model(input_ids=torch.tensor([[1]])).last_hidden_state,
        ]


def give_memory_back() -> None:
    """To the system: the C library would keep gigabytes of the weights that were made before."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def features_by_from_pretrained(folder: Path) -> list[torch.Tensor]:
    give_memory_back()
    return features_by_transformers(T5EncoderModel.from_pretrained(folder, torch_dtype=torch.float32).eval())


def features_by_emma(path: Path) -> list[torch.Tensor]:
    give_memory_back()
    encoder = load_text_encoder(path, torch.float32)
    return encoder.encode([PROMPT, ""])


def assert_same_features(path: Path, wanted: list[torch.Tensor]) -> None:
    for found, of_transformers in zip(features_by_emma(path), wanted, strict=True):
        assert_close(found, of_transformers, TOLERANCE)


@pytest.fixture(scope="module")
def fp16_folder(tmp_path_factory):
    folder = save_full_size_folder(tmp_path_factory.mktemp("full_size") / "flan", random_weights())
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def fp16_features(fp16_folder):
    return features_by_from_pretrained(fp16_folder)


@pytest.fixture
def scratch(tmp_path):
    """A folder that is emptied at once, as pytest keeps those of its last runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_sizes_are_those_of_flan_t5_xl(fp16_folder):
    t5_file = open_t5_file(fp16_folder)
    assert vars(t5_file.config) == SIZES
    assert sum(math.prod(entry.shape) for entry in t5_file.weights.values()) == 1_223_527_424


# --- memory; first, as this process holds little yet


@needs_proc
def test_fp16_from_an_fp16_file_needs_at_most_a_fifth_more_memory_than_the_file(fp16_folder):
    loading = measure("load_parts", fp16_folder, "float16")
    file_size = (fp16_folder / "model.safetensors").stat().st_size
    assert loading.weights == pytest.approx(file_size, rel=1e-3)
    assert loading.weights <= loading.peak <= 1.20 * file_size


@needs_proc
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_loading_needs_at_most_a_fifth_more_memory_than_the_weights_it_makes(fp16_folder, dtype):
    # In fp16 too: with the matrices that stay in fp32, the weights alone are 1.21 times the file.
    loading = measure("load_text_encoder", fp16_folder, dtype)
    assert loading.weights <= loading.peak <= 1.20 * loading.weights


# --- features


def test_encoder_only_fp16_equals_transformers(fp16_folder, fp16_features):
    assert_same_features(fp16_folder, fp16_features)


def test_single_file_with_decoder_equals_transformers(fp16_folder, fp16_features, scratch):
    path = save_full_size_file(scratch, with_decoder(weights_of(fp16_folder)))
    assert_same_features(path, fp16_features)


def with_decoder(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    shapes = {
        "lm_head.weight": (32128, 2048),
        "decoder.embed_tokens.weight": (32128, 2048),
        "decoder.block.0.layer.0.SelfAttention.q.weight": (2048, 2048),
        "decoder.block.0.layer.1.EncDecAttention.k.weight": (2048, 2048),
        "decoder.block.0.layer.2.DenseReluDense.wo.weight": (2048, 5120),
        "decoder.final_layer_norm.weight": (2048,),
    }
    return {**state, **{key: torch.ones(shape, dtype=torch.float16) for key, shape in shapes.items()}}


def test_sharded_folder_equals_transformers(fp16_folder, fp16_features, scratch):
    state = weights_of(fp16_folder)
    state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
    folder = save_sharded(scratch / "flan", state)
    del state  # as are the weights in the other tests, before the next are made
    save_tokenizer(folder / "tokenizer.json", WORDS)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert_same_features(folder, fp16_features)


def test_encoder_only_bf16_equals_transformers(fp16_folder, fp16_features, scratch):
    folder = save_full_size_folder(
        scratch / "flan", {key: value.bfloat16() for key, value in weights_of(fp16_folder).items()}
    )
    wanted = features_by_from_pretrained(folder)
    # The rounding of bf16 is seen, so that weights of another file would be too.
    assert (wanted[0] - fp16_features[0]).abs().max() > 10 * TOLERANCE * wanted[0].abs().max()
    assert_same_features(folder, wanted)


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_equals_transformers_with_the_dequantised_weights(fp16_folder, scratch, scaled):
    path = save_full_size_file(scratch, fp8_of(weights_of(fp16_folder), scaled))
    wanted = features_by_transformers(transformers_with(dequantised(load_file(path))))
    assert_same_features(path, wanted)


def fp8_of(state: dict[str, torch.Tensor], scaled: bool) -> dict[str, torch.Tensor]:
    """Every tensor in fp8, or the matrices of the layers with one scale each, as tools write them."""
    if not scaled:
        return {key: value.to(torch.float8_e4m3fn) for key, value in state.items()}
    stored = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in state.items():
        if ".SelfAttention.relative" in key or key == "shared.weight" or value.ndim < 2:
            stored[key] = value
            continue
        scale = value.abs().max().float() / 448
        stored[key] = value.float().div_(scale).to(torch.float8_e4m3fn)
        stored[key.replace(".weight", ".scale_weight")] = scale
    return stored


def dequantised(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    one = torch.ones(())
    return {
        key: stored[key].float().mul_(stored.get(key.replace(".weight", ".scale_weight"), one))
        for key in shapes_of_transformers()
    }


def transformers_with(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**CONFIG))
    model.load_state_dict({**weights, "encoder.embed_tokens.weight": weights["shared.weight"]}, assign=True)
    return model.eval()
