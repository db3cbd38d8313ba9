"""The plan fan: candidates that UP-MPC weighs in one state, decoded, in order of their score.

Each candidate is laid out like this, the chosen one framed in yellow. It is as narrow as
TensorBoard shows pictures, so that the words stay legible::

    #1  score 3.06 = return 3.03 +1 x uncertainty 0.02
    [now] [ +1 ] [ +2 ] [ +3 ] [ +4 ]         states on the way
           r 2.1  r 1.3  r 0.7  r 0.9         reward of arriving there
           u .02  u .01  u .01  u .02         disagreement about it
"""

from __future__ import annotations

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.behavior.planner import Plan
from latentplan.inspection.canvas import (
    BORDER,
    CHOSEN,
    DIM,
    GAP,
    LINE_HEIGHT,
    TEXT,
    UNCERTAIN,
    Color,
    as_uint8,
    canvas,
    even,
    framed,
    number,
    text,
    width_of,
)
from latentplan.inspection.open_loop import array, decode
from latentplan.types import Latent

MOST = 8  # candidates shown: the best ones
NARROWEST = 64  # pixels of a column, for its numbers


@torch.no_grad()
def show_plan_fan(agent: Agent, state: Latent) -> np.ndarray:
    """Both plans of one state (1): the optimistic one of the real environment, the conservative one
    of imagination.

    Returns:
        (H, W, 3) uint8.
    """
    c = agent.config.plan
    fans = []
    for where, optimism in (
        ("In the environment (optimistic)", c.explore_rate),
        ("In imagination (conservative)", -c.imagine_rate),
    ):
        plan = agent.behavior.plan(state, optimism)
        fans.append(draw_fan(plan, decoded(agent, plan), optimism, where))
    return _below(fans)


def decoded(agent: Agent, plan: Plan) -> np.ndarray | None:
    """Pictures (K, P+1, h, w, 3) of a plan of one state; None where the agent sees none."""
    images = agent.world.spec.images
    if not images:
        return None
    latent = plan.candidates.latent.map(lambda x: x[0])
    return as_uint8(array(decode(agent, latent)[images[0]]))


def draw_fan(plan: Plan, pictures: np.ndarray | None, optimism: float, title: str) -> np.ndarray:
    """Candidates of one state, (1, K), below one another in order of their score.

    Args:
        pictures: (K, P+1, h, w, 3) uint8 of the states on the way, the first being the same.
    """
    get = lambda x: array(x[0])  # noqa: E731
    score, ret, novelty = (get(x) for x in (plan.score, plan.ret, plan.novelty))
    rewards, doubt = get(plan.candidates.reward), plan.candidates.uncertainty
    doubts = None if doubt is None else get(doubt)
    order = np.argsort(-score, kind="stable")[:MOST]
    if len(order) < len(score):
        title = f"{title}: best {MOST} of {len(score)}"
    parts = [_line(title, TEXT)]
    for place, k in enumerate(order):
        chosen = k == int(plan.best[0])
        terms = f"return {number(ret[k])} {optimism:+g} x uncertainty {number(novelty[k])}"
        words = f"#{place + 1}  score {number(score[k])} = {terms}"
        parts.append(_line(words, CHOSEN if chosen else TEXT))
        numbers: list[list[tuple[str, Color]]] = [[] for _ in range(rewards.shape[1] + 1)]
        for step, reward in enumerate(rewards[k]):
            numbers[step + 1].append((f"r {number(reward)}", TEXT))
            if doubts is not None:
                numbers[step + 1].append((f"u {number(doubts[k, step])}", UNCERTAIN))
        of_k = None if pictures is None else pictures[k]
        parts.append(_strip(of_k, numbers, CHOSEN if chosen else DIM))
    return _below(parts)


def _strip(
    pictures: np.ndarray | None, numbers: list[list[tuple[str, Color]]], color: Color
) -> np.ndarray:
    """Framed pictures side by side, numbers under each; without pictures, the numbers."""
    columns = []
    lines = max(map(len, numbers))
    for step, words in enumerate(numbers):
        tiles = [] if pictures is None else [framed(pictures[step], np.asarray(color))]
        width = max(tiles[0].shape[1] if tiles else 0, NARROWEST + 2 * BORDER) + GAP
        if not tiles:
            tiles = [text([(f"+{step}" if step else "now", color)], width, LINE_HEIGHT)]
        words = [*words, *[("", TEXT)] * (lines - len(words))]
        parts = [*tiles, text(words, width, LINE_HEIGHT * lines)]
        columns.append(_below(parts, width))
    return np.concatenate(columns, 1)


def _line(words: str, color: Color) -> np.ndarray:
    return text([(words, color)], width_of(words), LINE_HEIGHT + GAP)


def _below(parts: list[np.ndarray], width: int | None = None) -> np.ndarray:
    """Pictures below one another, flush left."""
    width = width or even(max(part.shape[1] for part in parts))
    out = canvas(sum(part.shape[0] for part in parts), width)
    top = 0
    for part in parts:
        out[top : top + part.shape[0], : part.shape[1]] = part
        top += part.shape[0]
    return out
