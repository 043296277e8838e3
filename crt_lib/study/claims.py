"""The paper's claims, each held against the files under results/: `crt claims`.

claims.toml, beside this file, has what the paper says, the rule, its judge, and the command that
measures. No verdict is typed: a claim's judge reads measured files and applies its rule. Where
nothing was measured it says so and why.
"""

import tomllib
from pathlib import Path
from typing import Any

import jinja2

from crt_lib.files import write_rows, write_text
from crt_lib.study import judges

COLUMNS = (
    *("id", "claim", "paper", "place", "released", "honest", "verdict", "why", "rule"),
    *("profile", "seeds", "command"),
)
CLAIMS = tomllib.loads(Path(__file__).with_name("claims.toml").read_text(encoding="utf-8"))


def judge_claims(results: str | Path) -> list[dict[str, Any]]:
    """A row a claim, with the columns of `COLUMNS`, from the files under `results` alone."""
    rows = []
    for number, claim in CLAIMS.items():
        row = dict.fromkeys(COLUMNS, "") | {"id": number, "seeds": 0} | claim
        try:
            if "judge" not in claim:
                raise judges.Untested(claim["why"])
            row |= getattr(judges, claim["judge"])(Path(results), **claim.get("given", {}))
            row |= {name: row[name].format(**row) for name in ("why", "command")}
        except judges.Untested as reason:
            row |= {"verdict": judges.UNTESTED, "why": str(reason)}
            row |= {"profile": "", "seeds": 0, "command": ""}
        rows.append({name: row[name] for name in COLUMNS})
    return rows


def write_claims(results: str | Path) -> list[dict[str, Any]]:
    """Write claims.csv and claims.md into `results`; their rows."""
    results, rows = Path(results), judge_claims(results)
    write_rows(results / "claims.csv", rows)
    write_text(results / "claims.md", render_claims(rows))
    return rows


def render_claims(rows: list[dict[str, Any]]) -> str:
    """The ledger as a page."""
    text = Path(__file__).with_name("claims.md.j2").read_text(encoding="utf-8")
    page = jinja2.Template(text, trim_blocks=True, keep_trailing_newline=True)
    return page.render(rows=rows, summary=summary(rows))


def summary(rows: list[dict[str, Any]]) -> str:
    """How many claims have each verdict."""
    found = [row["verdict"] for row in rows]
    said = ", ".join(f"{kind}: {found.count(kind)}" for kind in judges.VERDICTS if kind in found)
    return f"Of the paper's {len(rows)} claims: {said}."
