"""Keys and values of earlier versions, and their present names.

Files of earlier versions are read with one warning. On the command line an earlier name is an error
that gives the present one.
"""

from __future__ import annotations

from typing import Any

RENAMED = {
    "env.count": "env.num_envs",
    "world.soft_updates": "world.anneal_updates",
    "plan.imagine_share": "plan.imagine_fraction",
    "mpdp.entropy_share": "mpdp.entropy_fraction",
}
RENAMED_VALUES = {"train.compile": {"cell": "on", "full": "on"}}


def present_names(flat: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Rename keys, references to keys (``${section.key}``), and values to their present names.

    Args:
        flat: dotted keys and their values.

    Returns:
        The renamed keys and values, and a text ``"<old> is now <new>"`` for each renamed key or
        value.
    """
    result, changes = {}, [f"{key} is now {RENAMED[key]}" for key in flat if key in RENAMED]
    for key, value in flat.items():
        values = RENAMED_VALUES.get(key, {})
        if isinstance(value, str) and value in values:
            changes.append(f"{key}={value} is now {key}={values[value]}")
            value = values[value]
        if isinstance(value, str):
            for old, new in RENAMED.items():
                value = value.replace("${" + old + "}", "${" + new + "}")
        result[RENAMED.get(key, key)] = value
    return result, changes
