"""The plan fan: the candidates that UP-MPC compares in one state, decoded and sorted by score.

Each candidate has this layout. The chosen one has a yellow frame. Columns are narrow because
TensorBoard shrinks wide images until the text is illegible::

    #1  score 3.06 = return 3.03 +1 x uncertainty 0.02
    [now] [ +1 ] [ +2 ] [ +3 ] [ +4 ]         predicted states
           r 2.1  r 1.3  r 0.7  r 0.9         reward of arriving in the state
           u .02  u .01  u .01  u .02         uncertainty of the step to the state
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.behavior.planner import Plan
from latentplan.inspection.action_names import name_actions
from latentplan.inspection.canvas import (
    BORDER,
    CHOSEN,
    DIM,
    FAINT,
    GAP,
    UNCERTAIN,
    add_border,
    as_uint8,
    blank_image,
    format_number,
    round_up_to_even,
)
from latentplan.inspection.open_loop import decode, to_numpy
from latentplan.runs.stamp import LINE_HEIGHT, TEXT, Color, draw_text, text_width
from latentplan.types import Latent

MAX_CANDIDATES = 8  # number of candidates that are drawn, those with the highest scores
MIN_COLUMN_WIDTH = 64  # pixels that the numbers below an image need


@torch.no_grad()
def make_plan_fan(agent: Agent, state: Latent) -> np.ndarray:
    """Draw two plans from one state (1): as in the real environment, and as in imagination.

    The first plan is optimistic, the second one conservative.

    Returns:
        (H, W, 3) uint8.
    """
    c = agent.config.plan
    fans = []
    for title, optimism in (
        ("In the environment (optimistic)", c.explore_rate),
        ("In imagination (conservative)", -c.imagine_rate),
    ):
        plan = agent.behavior.plan(state, optimism)
        names = name_actions(agent.world.spec, plan.candidates.choice.action[0, :, 0])
        fans.append(draw_plan(plan, decode_plan(agent, plan), optimism, title, names))
    return _stack_vertically(fans)


def decode_plan(agent: Agent, plan: Plan) -> np.ndarray | None:
    """Images (K, P+1, h, w, 3) uint8 of the plan of one state. None if the agent sees no images."""
    images = agent.world.spec.images
    if not images:
        return None
    latent = plan.candidates.latent.map(lambda x: x[0])
    return as_uint8(to_numpy(decode(agent, latent)[images[0]]))


def draw_plan(
    plan: Plan,
    images: np.ndarray | None,
    optimism: float,
    title: str,
    names: Sequence[str] = (),
) -> np.ndarray:
    """Draw the candidates (1, K) of one state below one another, in the order of their scores.

    Args:
        plan: the plan of one state.
        images: (K, P+1, h, w, 3) uint8 of the predicted states; the first one is the start. None
            if the agent sees no images.
        optimism: the factor of the uncertainty in the score.
        title: the text above the candidates.
        names: of the first action of each candidate; empty: they have none.

    Returns:
        (H, W, 3) uint8.
    """
    get = lambda x: to_numpy(x[0])  # noqa: E731
    score, ret, novelty = (get(x) for x in (plan.score, plan.ret, plan.novelty))
    rewards = get(plan.candidates.reward)
    measured = plan.candidates.uncertainty
    uncertainty = None if measured is None else get(measured)
    order = np.argsort(-score, kind="stable")[:MAX_CANDIDATES]
    if len(order) < len(score):
        title = f"{title}: best {MAX_CANDIDATES} of {len(score)}"
    parts = [_draw_line(title, TEXT)]
    for rank, k in enumerate(order):
        chosen = k == int(plan.best[0])
        terms = (
            f"return {format_number(ret[k])} {optimism:+g} x uncertainty "
            f"{format_number(novelty[k])}"
        )
        label = f"#{rank + 1}  score {format_number(score[k])} = {terms}"
        if names:
            label += f"  {names[k]}"
        parts.append(_draw_line(label, CHOSEN if chosen else TEXT))
        numbers: list[list[tuple[str, Color]]] = [[] for _ in range(rewards.shape[1] + 1)]
        for step, reward in enumerate(rewards[k]):
            numbers[step + 1].append((f"r {format_number(reward)}", TEXT))
            if uncertainty is not None:
                value = format_number(uncertainty[k, step])
                numbers[step + 1].append((f"u {value}", UNCERTAIN))
        images_of_candidate = None if images is None else images[k]
        parts.append(_draw_candidate(images_of_candidate, numbers, CHOSEN if chosen else DIM))
    return _stack_vertically(parts)


def _draw_candidate(
    images: np.ndarray | None, numbers: list[list[tuple[str, Color]]], color: Color
) -> np.ndarray:
    """Draw images (P+1, h, w, 3) side by side with numbers below. Without images, only numbers."""
    columns = []
    lines = max(map(len, numbers))
    for step, labels in enumerate(numbers):
        tiles = [] if images is None else [add_border(images[step], np.asarray(color))]
        width = max(tiles[0].shape[1] if tiles else 0, MIN_COLUMN_WIDTH + 2 * BORDER) + GAP
        if not tiles:
            word = (f"+{step}" if step else "now", FAINT if color == DIM else color)
            tiles = [draw_text([word], width, LINE_HEIGHT)]
        labels = [*labels, *[("", TEXT)] * (lines - len(labels))]
        parts = [*tiles, draw_text(labels, width, LINE_HEIGHT * lines)]
        columns.append(_stack_vertically(parts, width))
    return np.concatenate(columns, 1)


def _draw_line(line: str, color: Color) -> np.ndarray:
    return draw_text([(line, color)], text_width(line), LINE_HEIGHT + GAP)


def _stack_vertically(parts: list[np.ndarray], width: int | None = None) -> np.ndarray:
    """Put images (h, w, 3) below one another, flush left."""
    width = width or round_up_to_even(max(part.shape[1] for part in parts))
    out = blank_image(sum(part.shape[0] for part in parts), width)
    top = 0
    for part in parts:
        out[top : top + part.shape[0], : part.shape[1]] = part
        top += part.shape[0]
    return out
