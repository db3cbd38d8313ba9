"""``latentplan export RUN``: a policy as one file that runs without latentplan.

One decision is a pure function, and its caller keeps the state::

    obs..., prev_action, deter, stoch, uniform  ->  action, next_deter, next_stoch

An episode begins with zeros for ``prev_action``, ``deter`` and ``stoch``. In later calls they are
the outputs of the previous call. ``uniform`` are new random numbers in [0, 1) for every call. The
state is sampled from its posterior with them.
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
from latentplan.runs.source import RunSource
from latentplan.types import EnvSpec, Latent, Timestep, UserError

STATE = ("prev_action", "deter", "stoch")
OUTPUTS = ("action", "next_deter", "next_stoch")  # and "index" of discrete actions
TEST_DECISIONS = 100  # decisions in which the file is compared with the agent
TOLERANCE = 1e-4  # largest difference of actions and states, which are in [-1, 1]
# Test decisions that may differ. Rounding can change the class if a random number is at the border
# of two classes.
MAX_DIFFERENT = 2
SUFFIXES = (".pt2", ".onnx")

Decide = Callable[..., tuple[Tensor, ...]]


class Decision(nn.Module):
    """One decision of one environment with the actor's mean action, or its most likely one.

    It computes the same as :meth:`latentplan.deploy.loading.LoadedAgent.act`.
    """

    def __init__(self, agent: Agent):
        super().__init__()
        self.agent = agent
        spec = agent.world.spec
        self.groups = spec.action_groups
        self.inputs = (*spec.obs, *STATE, "uniform")
        self.outputs = (*OUTPUTS, "index") if self.groups else OUTPUTS
        # A run of which the bounds are not known counts its choices from 0.
        self.first = [int(x) for x in spec.action_low] or [0] * len(self.groups)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute ``outputs`` from tensors in the order of ``inputs``; their first axis is 1.

        Of discrete actions, ``index`` (1, G) int64 is what the environment takes, and the one-hot
        ``action`` is the next ``prev_action``.
        """
        *obs, prev_action, deter, stoch, uniform = tensors
        # A first row would set the state to zeros. The caller passes zeros at the start of an
        # episode, so no row needs to be marked as the first.
        flag = torch.zeros(1, dtype=torch.bool, device=deter.device)
        row = Timestep(
            dict(zip(self.agent.world.spec.obs, obs, strict=True)),
            *(prev_action, torch.zeros_like(deter[:, 0]), flag, flag),
        )
        latent = self.agent.world.filter(row, Latent(deter, stoch), uniform)
        action = self.agent.behavior.policy(latent).mode.clamp(-1, 1)
        result = action, latent.deter, latent.stoch
        if not self.groups:
            return result
        parts = action.split(self.groups, -1)
        index = [x.argmax(-1) + first for x, first in zip(parts, self.first, strict=True)]
        return *result, torch.stack(index, -1)


def export(
    run: str | Path, out: str | Path | None = None, *, checkpoint: str = ""
) -> dict[str, Any]:
    """Write the policy of a run folder to a file.

    The file is compared with the agent, and is only kept if both act alike. Weights and arithmetic
    are float32. The file contains ``latentplan.json`` with the shapes of its inputs and outputs,
    the action repeat, the environment's action bounds, the task, and the frames of training.

    Args:
        run: the run folder.
        out: ``*.pt2`` for :func:`torch.export.load`, or ``*.onnx``. Default RUN/policy.pt2.
        checkpoint: a kept checkpoint, ``best`` or a number of frames, instead of the newest.

    Returns:
        The path, the content of ``latentplan.json``, and the result of the comparison:
        ``largest_difference``, and the median and 99th percentile of the ``milliseconds`` that a
        decision takes on one core.

    Raises:
        UserError: the folder contains no run, the suffix is another one, packages for ONNX are
            missing, the file cannot be written, or it acts differently from the agent.
    """
    folder = Path(run)
    path = Path(out) if out else folder / "policy.pt2"
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must end in {' or '.join(SUFFIXES)}.")
    write, open_file = (_write_onnx, _open_onnx) if path.suffix == ".onnx" else (_write, _open)
    # No environment is built, so its code need not be trusted.
    source = RunSource(folder, trust=True, checkpoint=checkpoint)
    agent, config, spec, payload = run_folder.load_agent(source)
    agent.world.use_bfloat16 = False  # the machine that runs the policy may not support it
    decision = Decision(agent).eval().requires_grad_(False)
    inputs = _random_inputs(agent, spec)
    description = {
        "task": config.task,
        "frames": payload["frames"],
        "inputs": {k: _describe(x) for k, x in zip(decision.inputs, inputs[0], strict=True)},
        "outputs": dict(zip(OUTPUTS, map(_describe, inputs[0][-4:-1]), strict=True)),
        "repeat": spec.repeat,
        "action_low": spec.action_low,
        "action_high": spec.action_high,
    }
    if spec.action_groups:
        description["outputs"]["index"] = f"int64 1x{len(spec.action_groups)}"
        description |= {"action_groups": spec.action_groups, "action_names": spec.action_names}
    temporary = path.with_name(f".{path.name.removesuffix(path.suffix)}-new{path.suffix}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad(), _without_exporter_messages():
            write(decision, inputs[0], description, temporary)
            comparison = _compare(decision, open_file(temporary), inputs)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        torch.set_num_threads(threads)
        with suppress(OSError):  # the file was renamed, or was never written
            temporary.unlink()
    return {"path": str(path), **description, **comparison}


def _random_inputs(agent: Agent, spec: EnvSpec) -> list[tuple[Tensor, ...]]:
    """Inputs of ``TEST_DECISIONS`` decisions: random observations, and states of zeros."""

    def noise(shape: tuple[int, ...], dtype: str) -> Tensor:
        image = dtype == "uint8"
        return torch.randint(256, (1, *shape)).byte() if image else torch.randn(1, *shape)

    return [
        (
            *(noise(*entry) for entry in spec.obs.values()),
            torch.rand(1, spec.action_dim) * 2 - 1,
            *agent.initial(1),
            torch.rand(1, agent.config.world.stoch),
        )
        for _ in range(TEST_DECISIONS)
    ]


def _compare(
    decision: Decision, exported: Decide, inputs: list[tuple[Tensor, ...]]
) -> dict[str, Any]:
    """Compare the exported policy with the agent, and measure its time.

    Both start every decision from the agent's state.

    Raises:
        UserError: they differ in more than ``MAX_DIFFERENT`` decisions.
    """
    largest, times = [], []
    state = inputs[0][-3:-1]
    for *observed, _, _, uniform in inputs:
        tensors = (*observed, *state, uniform)
        begin = time.perf_counter()
        outputs = exported(*tensors)
        times.append(1000 * (time.perf_counter() - begin))
        expected = decision(*tensors)
        state = expected[1:3]
        differences = [(a - b).abs().max().float() for a, b in zip(outputs, expected, strict=True)]
        largest.append(float(torch.stack(differences).max()))
    agreeing = [x for x in largest if x <= TOLERANCE]
    different = TEST_DECISIONS - len(agreeing)
    if different > MAX_DIFFERENT:
        raise UserError(
            f"The exported policy differs from the agent's in {different} of {TEST_DECISIONS} "
            f"decisions, by up to {max(largest):.2g}."
        )
    percentiles = statistics.quantiles(times[TEST_DECISIONS // 10 :], n=100)
    milliseconds = {"p50": percentiles[49], "p99": percentiles[98]}
    return {"largest_difference": max(agreeing), "milliseconds": milliseconds}


def _describe(x: Tensor) -> str:
    """The type and shape of a tensor, such as ``float32 1x4``."""
    return f"{str(x.dtype).removeprefix('torch.')} {'x'.join(map(str, x.shape))}"


@contextmanager
def _without_exporter_messages() -> Iterator[None]:
    """Hide warnings and log messages of the exporters, which do not help users of latentplan."""
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


def _write(decision: Decision, example: tuple[Tensor, ...], metadata: dict, path: Path) -> None:
    program = torch.export.export(decision, example)
    content = io.BytesIO()  # with a path, torch would hide the reason of a failure
    torch.export.save(program, content, extra_files={"latentplan.json": json.dumps(metadata)})
    path.write_bytes(content.getvalue())


def _open(path: Path) -> Decide:
    return torch.export.load(path).module()


def _write_onnx(
    decision: Decision, example: tuple[Tensor, ...], metadata: dict, path: Path
) -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            "ONNX needs more packages: pip install onnx onnxruntime onnxscript."
        ) from error
    program = torch.onnx.export(
        decision,
        example,
        dynamo=True,
        verbose=False,
        input_names=list(decision.inputs),
        output_names=list(decision.outputs),
    )
    assert program is not None  # always true with dynamo=True
    program.model.metadata_props["latentplan.json"] = json.dumps(metadata)
    program.save(path)


def _open_onnx(path: Path) -> Decide:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def decide(*tensors: Tensor) -> tuple[Tensor, ...]:
        arrays = (x.numpy() for x in tensors)
        results = session.run(None, dict(zip(names, arrays, strict=True)))
        return tuple(map(torch.from_numpy, results))

    return decide
