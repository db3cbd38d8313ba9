"""``latentplan export RUN``: a policy as one file that needs nothing of latentplan.

One decision is a pure function; whoever calls it keeps the state::

    obs..., prev_action, deter, stoch, uniform  ->  action, next_deter, next_stoch

An episode begins with zeros for ``prev_action``, ``deter`` and ``stoch``; after that they are the
last call's outputs. ``uniform``, fresh numbers in [0, 1), draws the state from its posterior.
"""

from __future__ import annotations

import io
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentplan.agent import Agent
from latentplan.runs import run_folder
from latentplan.types import EnvSpec, Latent, Timestep, UserError

STATE = ("prev_action", "deter", "stoch")
OUTPUTS = ("action", "next_deter", "next_stoch")
TRIED = 100  # decisions on which the file must agree with the agent
TOLERANCE = 1e-4  # of actions and states, which lie in [-1, 1]
FLIPS = 2  # of them may differ: a draw at the border of two classes falls to either side
SUFFIXES = (".pt2", ".onnx")

Decide = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Decision(nn.Module):
    """One decision of one environment, by the actor's mean, as :class:`LoadedAgent` makes it."""

    def __init__(self, agent: Agent):
        super().__init__()
        self.agent = agent
        self.inputs = (*agent.world.spec.obs, *STATE, "uniform")

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of ``inputs`` -> ``OUTPUTS``, each with a leading axis of 1."""
        *obs, prev_action, deter, stoch, uniform = tensors
        # Zeros of the first call are what a first row would make of any past.
        flag = torch.zeros(1, dtype=torch.bool, device=deter.device)
        row = Timestep(
            dict(zip(self.agent.world.spec.obs, obs, strict=True)),
            *(prev_action, torch.zeros_like(deter[:, 0]), flag, flag),
        )
        latent = self.agent.world.filter(row, Latent(deter, stoch), uniform)
        action = self.agent.behavior.policy(latent).mode.clamp(-1, 1)
        return action, latent.deter, latent.stoch


def export(run: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Write the policy of a run folder; it is kept only where it acts as the agent does.

    Weights and arithmetic are float32. The file carries ``latentplan.json``: what it takes and
    gives, action repeat, the environment's action bounds, the task and the frames trained.

    Args:
        out: ``*.pt2``, for :func:`torch.export.load`, or ``*.onnx``; default RUN/policy.pt2.

    Returns:
        What the file carries, and how it was tried: ``largest_difference``, and the median and
        99th percentile of ``milliseconds`` a decision, one after the other, on one core.

    Raises:
        UserError: no run there, another suffix, no packages for ONNX, a file that cannot be
            written or acts differently.
    """
    folder = Path(run)
    path = Path(out) if out else folder / "policy.pt2"
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must end in {' or '.join(SUFFIXES)}.")
    write, open_file = (_write_onnx, _open_onnx) if path.suffix == ".onnx" else (_write, _open)
    agent, config, spec, saved = run_folder.load_agent(folder)
    agent.world.use_bfloat16 = False  # not every machine that a policy goes to has it
    decision = Decision(agent).eval().requires_grad_(False)
    inputs = _examples(agent, spec)
    description = {
        "task": config.task,
        "frames": saved["frames"],
        "inputs": {k: _described(x) for k, x in zip(decision.inputs, inputs[0], strict=True)},
        "outputs": dict(zip(OUTPUTS, map(_described, inputs[0][-4:-1]), strict=True)),
        "repeat": spec.repeat,
        "action_low": spec.action_low,
        "action_high": spec.action_high,
    }
    temporary = path.with_name(f".{path.name.removesuffix(path.suffix)}-new{path.suffix}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad(), _quiet():
            write(decision, inputs[0], description, temporary)
            tried = _try(decision, open_file(temporary), inputs)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        torch.set_num_threads(threads)
        with suppress(OSError):  # it is not there, or nothing can be
            temporary.unlink()
    return {"path": str(path), **description, **tried}


def _examples(agent: Agent, spec: EnvSpec) -> list[tuple[Tensor, ...]]:
    """Inputs of ``TRIED`` decisions: noise to see, states of zeros that the first decision has."""

    def noise(shape: tuple[int, ...], dtype: str) -> Tensor:
        picture = dtype == "uint8"
        return torch.randint(256, (1, *shape)).byte() if picture else torch.randn(1, *shape)

    return [
        (
            *(noise(*entry) for entry in spec.obs.values()),
            torch.rand(1, spec.action_dim) * 2 - 1,
            *agent.initial(1),
            torch.rand(1, agent.config.world.stoch),
        )
        for _ in range(TRIED)
    ]


def _try(decision: Decision, written: Decide, inputs: list[tuple[Tensor, ...]]) -> dict[str, Any]:
    """Both from the same states, decision after decision, along the agent's own path."""
    largest, times = [], []
    state = inputs[0][-3:-1]
    for *seen, _, _, uniform in inputs:
        tensors = (*seen, *state, uniform)
        begin = time.perf_counter()
        found = written(*tensors)
        times.append(1000 * (time.perf_counter() - begin))
        expected = decision(*tensors)
        state = expected[1:]
        differences = [(a - b).abs().max() for a, b in zip(found, expected, strict=True)]
        largest.append(float(torch.stack(differences).max()))
    agreeing = [x for x in largest if x <= TOLERANCE]
    if len(agreeing) < TRIED - FLIPS:
        raise UserError(
            f"The exported policy differs from the agent's in {TRIED - len(agreeing)} of {TRIED} "
            f"decisions, by up to {max(largest):.2g}."
        )
    cuts = statistics.quantiles(times[TRIED // 10 :], n=100)
    return {"largest_difference": max(agreeing), "milliseconds": {"p50": cuts[49], "p99": cuts[98]}}


def _described(x: Tensor) -> str:
    """``float32 1x4``"""
    return f"{str(x.dtype).removeprefix('torch.')} {'x'.join(map(str, x.shape))}"


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters have much to say about their own passes."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)


# --- the formats ----------------------------------------------------------------------------


def _write(decision: Decision, example: tuple[Tensor, ...], about: dict, path: Path) -> None:
    program = torch.export.export(decision, example)
    content = io.BytesIO()  # given a path, torch hides why it cannot be written
    torch.export.save(program, content, extra_files={"latentplan.json": json.dumps(about)})
    path.write_bytes(content.getvalue())


def _open(path: Path) -> Decide:
    return torch.export.load(path).module()


def _write_onnx(decision: Decision, example: tuple[Tensor, ...], about: dict, path: Path) -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            "ONNX needs packages of its own: pip install onnx onnxruntime onnxscript."
        ) from error
    program = torch.onnx.export(
        decision,
        example,
        dynamo=True,
        verbose=False,
        input_names=list(decision.inputs),
        output_names=list(OUTPUTS),
    )
    assert program is not None  # with dynamo=True there is always one
    program.model.metadata_props["latentplan.json"] = json.dumps(about)
    program.save(path)


def _open_onnx(path: Path) -> Decide:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def decide(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        arrays = (x.numpy() for x in tensors)
        action, deter, stoch = session.run(None, dict(zip(names, arrays, strict=True)))
        return torch.from_numpy(action), torch.from_numpy(deter), torch.from_numpy(stoch)

    return decide
