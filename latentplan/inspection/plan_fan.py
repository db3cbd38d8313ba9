"""The plan fan: candidates that UP-MPC weighs in one state, decoded, in order of their score."""

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
    Line,
    as_uint8,
    axis,
    bounds,
    canvas,
    chart,
    even,
    framed,
    number,
    text,
)
from latentplan.inspection.open_loop import decode
from latentplan.types import Latent

MOST = 8  # candidates shown: the best ones
CHART_WIDTH, CHART_HEIGHT, WORDS_WIDTH = 170, 64, 190
TITLE_HEIGHT = LINE_HEIGHT + 5


@torch.no_grad()
def show_plan_fan(agent: Agent, state: Latent) -> np.ndarray:
    """Both plans of one state (1): the optimistic one of the real environment, the conservative one
    of imagination. A row per candidate, the best first, the chosen one framed.

    Returns:
        (H, W, 3) uint8.
    """
    c = agent.config.plan
    parts = []
    for place, optimism in (
        ("In the environment, optimistic", c.explore_rate),
        ("In imagination, conservative", -c.imagine_rate),
    ):
        plan = agent.behavior.plan(state, optimism)
        title = f"{place}: score = return {optimism:+g} x uncertainty, each in its own unit"
        parts.append(draw_fan(plan, decoded(agent, plan), optimism, title))
    out = canvas(sum(x.shape[0] for x in parts), max(x.shape[1] for x in parts))
    top = 0
    for part in parts:
        out[top : top + part.shape[0], : part.shape[1]] = part
        top += part.shape[0]
    return out


def decoded(agent: Agent, plan: Plan) -> np.ndarray | None:
    """Pictures (K, P+1, h, w, 3) of a plan of one state; None where the agent sees none."""
    images = agent.world.spec.images
    if not images:
        return None
    latent = Latent(*(x[0] for x in plan.candidates.latent))
    return as_uint8(decode(agent, latent)[images[0]].float().cpu().numpy())


def draw_fan(plan: Plan, pictures: np.ndarray | None, optimism: float, title: str) -> np.ndarray:
    """Candidates of one state, (1, K), as rows in order of their score.

    Args:
        pictures: (K, P+1, h, w, 3) uint8 of the states on the way, the first being the same.
    """
    get = lambda x: x[0].float().cpu().numpy()  # noqa: E731
    score, ret, novelty, value = (get(x) for x in (plan.score, plan.ret, plan.novelty, plan.value))
    order = np.argsort(-score, kind="stable")[:MOST]
    rewards = plan.candidates.reward[0].float().cpu().numpy()
    doubt = plan.candidates.uncertainty
    doubts = np.full_like(rewards, np.nan) if doubt is None else get(doubt)
    best = int(plan.best[0])
    lines = [Line("reward", rewards, TEXT), Line("uncertainty", doubts, UNCERTAIN)]
    rows = []
    for place, k in enumerate(order):
        color = CHOSEN if k == best else DIM
        words = [
            (f"#{place + 1}  score {number(score[k])}", color if k == best else TEXT),
            (f"return {number(ret[k])} (value {number(value[k])})", TEXT),
            (f"uncertainty {optimism:+g} x {number(novelty[k])}", UNCERTAIN),
        ]
        own = [line._replace(values=line.values[k], within=bounds([line])) for line in lines]
        rows.append(_row(words, None if pictures is None else pictures[k], color, own))
    head = text([(_title(title, len(score)), TEXT)], rows[0].shape[1], TITLE_HEIGHT)
    names = _names(lines, rows[0].shape, None if pictures is None else pictures.shape)
    return np.concatenate([head, names, *rows])


def row_height(picture: int) -> int:
    """Pixels from one candidate to the next; ``picture`` pixels high, 0 without pictures."""
    return (picture + 2 * BORDER if picture else CHART_HEIGHT) + GAP


def _title(title: str, count: int) -> str:
    return title if count <= MOST else f"{title}   (best {MOST} of {count})"


def _names(lines: list[Line], row: tuple[int, ...], pictures: tuple[int, ...] | None) -> np.ndarray:
    """What the columns are: steps ahead, and the charts with their ranges."""
    out = canvas(LINE_HEIGHT, row[1])
    left = WORDS_WIDTH + GAP
    for step in range(pictures[1] if pictures else 0):
        width = pictures[3] + 2 * BORDER
        out[:, left : left + width] = text(
            [(f"+{step}" if step else "now", TEXT)], width, LINE_HEIGHT
        )
        left += width + GAP
    for line in lines:
        words = f"{line.name} {axis([line])}"
        out[:, left : left + CHART_WIDTH] = text([(words, line.color)], CHART_WIDTH, LINE_HEIGHT)
        left += CHART_WIDTH + GAP
    return out


def _row(
    words: list[tuple[str, Color]], pictures: np.ndarray | None, color: Color, lines: list[Line]
) -> np.ndarray:
    """[words][states on the way][charts], as high as the pictures."""
    tiles = [] if pictures is None else list(framed(pictures, np.asarray(color)))
    height = row_height(pictures.shape[1] if tiles else 0) - GAP
    parts = [text(words, WORDS_WIDTH, height), *tiles]
    parts += [chart([line], CHART_WIDTH, height, *line.within) for line in lines]
    row = canvas(height + GAP, even(sum(x.shape[1] + GAP for x in parts)))
    left = 0
    for part in parts:
        row[:height, left : left + part.shape[1]] = part
        left += part.shape[1] + GAP
    return row
