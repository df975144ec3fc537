"""Tokens of a whole schedule: all timesteps in one pass against a plain loop of one forward per step and prompt.

Positive prompt with 0, 1 and 3 modules, negative prompt without, at the size of the released ELLA file, random weights.
Both ways run in turn in one process; the table gives medians and the largest difference between their tokens, in
standard deviations of the tokens.

    python benchmarks/schedule_tokens.py --threads 1
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "core")]

from literal_equations import EllaConnector, EmmaModule, Used  # noqa: E402

from emma_core import Assembly, Connector, ConnectorConfig, FeatureSpec, GatedResampler, ModuleConfig, Reference  # noqa: E402
from emma_core.files.connector_file import connector_tensors  # noqa: E402
from emma_core.files.module_file import module_tensors  # noqa: E402
from emma_core.model.assembly import tokens_over_schedule  # noqa: E402

# condition -> feature -> (vectors, dim, tokens per vector)
CONDITIONS = {
    "style": {"global": (1, 1024, 4)},
    "object": {"global": (1, 1024, 1), "local": (257, 1280, 1)},
    "face": {"identity": (1, 512, 4)},
}


Model = TypeVar("Model", bound=torch.nn.Module)


class Prompts(NamedTuple):
    positive_1ND: torch.Tensor
    negative_1ND: torch.Tensor
    timestep_T: torch.Tensor


class Timing(NamedTuple):
    wall_s: float
    cpu_s: float


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    prompts = Prompts(torch.randn(1, options.positive_tokens, 2048), torch.randn(1, options.negative_tokens, 2048),
                      torch.linspace(999, 0, options.steps))
    connector = random_weights(Connector(ConnectorConfig()))
    references = [random_reference(condition) for condition in CONDITIONS]
    print(f"{options.steps} steps, {options.positive_tokens} + {options.negative_tokens} text tokens, "
          f"{options.threads} thread(s), {options.repeats} repeats in turn")
    print("modules | loop s | one pass s | ratio | best ratio | CPU time ratio | max difference / std")
    with torch.inference_mode():
        for count in options.modules:
            compare(connector, references[:count], prompts, options.repeats)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens of a whole schedule: one pass against a plain loop.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--positive-tokens", type=int, default=20, help="length of the positive prompt")
    parser.add_argument("--negative-tokens", type=int, default=1, help="1: the end token of an empty prompt")
    parser.add_argument("--modules", type=int, nargs="+", default=[0, 1, 3], choices=range(len(CONDITIONS) + 1))
    return parser.parse_args()


def random_weights(model: Model) -> Model:
    for name, weight in model.named_parameters():
        weight.data = torch.randn(weight.shape) * (0.02 if weight.ndim < 2 else weight.shape[-1] ** -0.5)
        if name.endswith(("attn_gate", "ffn_gate")):
            weight.data.fill_(0.1)
    return model.eval().requires_grad_(False)


def random_reference(condition: str) -> Reference:
    features = CONDITIONS[condition]
    specs = {name: FeatureSpec(dim, tokens) for name, (_, dim, tokens) in features.items()}
    size = ConnectorConfig()
    config = ModuleConfig(condition=condition, width=size.width, heads=size.heads, layers=size.layers, features=specs)
    vectors = {name: torch.randn(1, count, dim) for name, (count, dim, _) in features.items()}
    return Reference(random_weights(GatedResampler(config)), vectors)


def compare(connector: Connector, references: list[Reference], prompts: Prompts, repeats: int) -> None:
    """Print one row of the table."""
    plain, used = plain_copies(connector, references)

    def loop() -> torch.Tensor:
        return torch.stack([torch.cat([plain(prompts.positive_1ND, float(timestep), used),
                                       plain(prompts.negative_1ND, float(timestep))])
                            for timestep in prompts.timestep_T])

    def one_pass() -> torch.Tensor:
        positive = tokens_over_schedule(connector, prompts.positive_1ND, prompts.timestep_T, Assembly(references))
        negative = tokens_over_schedule(connector, prompts.negative_1ND, prompts.timestep_T, Assembly())
        return torch.cat([positive, negative], dim=1)

    wanted = loop()  # also warms both up
    difference = ((one_pass() - wanted).abs().max() / wanted.std()).item()
    loops, passes = [], []
    for _ in range(repeats):
        loops.append(timed(loop))
        passes.append(timed(one_pass))
    loop_s, pass_s = (statistics.median(timing.wall_s for timing in timings) for timings in (loops, passes))
    best = min(timing.wall_s for timing in loops) / min(timing.wall_s for timing in passes)
    cpu = statistics.median(timing.cpu_s for timing in loops) / statistics.median(timing.cpu_s for timing in passes)
    print(f"{len(references)} | {loop_s:.2f} | {pass_s:.2f} | {loop_s / pass_s:.2f} | {best:.2f} | {cpu:.2f} | "
          f"{difference:.1e}", flush=True)


def plain_copies(connector: Connector, references: list[Reference]) -> tuple[EllaConnector, list[Used]]:
    """The same weights in the plain transcription of the papers' equations."""
    with torch.device("meta"):
        plain = EllaConnector(connector.config)
        modules = [EmmaModule(reference.module.config) for reference in references]
    plain.load_state_dict(connector_tensors(connector), assign=True)
    for module, reference in zip(modules, references, strict=True):
        module.load_state_dict(module_tensors(reference.module), assign=True)
    used = [Used(module.eval(), reference.features, 1.0)
            for module, reference in zip(modules, references, strict=True)]
    return plain.eval(), used


def timed(run: Callable[[], torch.Tensor]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    main()
