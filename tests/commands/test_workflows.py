"""What runs elsewhere: workflows and hooks name targets and programs that exist, and forms load."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_make_knows(path):
    jobs = load(path)["jobs"].values()
    runs = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    targets = [words for run in runs for words in re.findall(r"^make (.+)$", run, re.M)]
    assert targets
    for words in targets:
        done = subprocess.run(
            ["make", "--dry-run", *words.split()], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_the_tests_run_with_every_python_that_is_promised():
    job = load(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["test"]
    versions = job["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = ".".join(project["requires-python"].removeprefix(">=").split(".")[:2])
    assert versions[0] == lowest
    assert versions == sorted(versions, key=lambda text: int(text.split(".")[1]))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_asks_for_something_in_words_of_its_own(path):
    form = load(path)
    if path.stem == "config":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids)
    for part in form["body"]:
        assert part["type"] in {"input", "textarea", "dropdown", "checkboxes"}
        assert part["attributes"]["label"]
    required = [part.get("validations", {}).get("required") for part in form["body"]]
    assert any(required)


def test_hooks_call_programs_that_the_tests_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = " ".join(project["optional-dependencies"]["test"])
    packages = {"ruff": "ruff", "lint-imports": "import-linter", "mypy": "mypy"}
    (local,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    for hook in local["hooks"]:
        program = hook["entry"].split()[0]
        pinned = " ".join(hook.get("additional_dependencies", []))
        known = extra if hook["language"] == "system" else pinned
        assert packages.get(program, program) in known, program


def test_the_notebooks_hook_keeps_outputs_and_tags_and_cleans_the_rest():
    """With all of nb-clean's four --preserve-... flags it would clean nothing."""
    (local,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    (hook,) = [hook for hook in local["hooks"] if hook["id"] == "nb-clean"]
    kept = {"--preserve-cell-outputs", "--preserve-execution-counts"}
    assert set(hook["args"]) == kept | {"--preserve-cell-metadata-field=tags"}


def test_a_machine_elsewhere_is_set_up_by_what_is_here():
    made = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    target = made["postCreateCommand"].removeprefix("make ")
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True)
    assert done.returncode == 0
    binder = ROOT / ".binder" / "postBuild"
    assert os.access(binder, os.X_OK)
    subprocess.run(["sh", "-n", str(binder)], check=True)
    extras = re.findall(r"\.\[(.+)\]", binder.read_text(encoding="utf-8"))[0].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras) <= set(project["optional-dependencies"])
    ours = load(ROOT / "environment.yml")["dependencies"]
    assert load(ROOT / ".binder" / "environment.yml")["dependencies"] == ours[:-1]
