"""A checkpoint with wrong content is refused in one sentence, or works."""

from __future__ import annotations

from pathlib import Path

import checkpoint_fuzz
from tiny import run_config

from latentplan.training.session import train


def test_wrong_content_is_refused_or_works(tmp_path: Path) -> None:
    settings = ("steps=128", "obs=both", "log.inspect_every=0", "eval.every=0", "eval.video=false")
    run = train(run_config(tmp_path / "run", *settings))
    failures = checkpoint_fuzz.run_cases(run, tmp_path, seed=0, count=30)
    assert not failures, "\n\n".join(f"{x.change}, {x.use}\n{x.error}" for x in failures[:5])
