"""docs/results.json, and the tables that README and docs make of it."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from pipelines import reproduce
from pipelines.console import UserError
from pipelines.judging.together import Standing
from pipelines.pages.results import TABLES, Ranking, Results, Training, read_results, summary, write_results, written
from pipelines.pages.tables import markdown
from tests.parts import compared, small_splits

ROOT = Path(__file__).parents[1]
TRAINING = Training(
    command="mnist5k",
    seed=0,
    gap_closed=0.5,
    gap_closed_tuned=0.75,
    sampling="guidance 1",
    rows={
        "reconstruction": {"fd": 1.0},
        "standard": {"fd": 11.0},
        "learned": {"fd": 6.0, "precision": 0.5, "recall": 0.6, "coverage": 0.7},
        "tuned": {"fd": 3.5, "precision": 0.8, "recall": 0.6, "coverage": 0.7},
    },
    images=100,
    seconds={"stage1": 90.0, "stage2": 60.0, "comparison": 30.0},
    commit="abc",
    hardware="a CPU, 2 threads",
)

STANDING = Standing("PixelSNAIL", "a", 6.0, 0.5, 0.5, 0.6, 0.7, 0.01, 0.0, 0.0, 1000, 60.0, 2.0)
RANKING = Ranking("mnist5k", 0, [STANDING, dataclasses.replace(STANDING, prior="N(0, I)", fd=None)], "abc", "a CPU, 2 threads")
RESULTS = Results([TRAINING], [RANKING])


@pytest.mark.parametrize("document", reproduce.DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_of_readme_and_docs_are_those_of_the_results(document):
    text, results = document.read_text(), read_results(reproduce.RESULTS)
    assert results.trainings and "<!-- table " in text
    assert written(text, results) == text, "make the tables anew: python -m pipelines.reproduce --tables"


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_pages_are_short(page):
    assert len(page.read_text().splitlines()) <= 150


def test_what_is_published_is_what_stands_in_the_results():
    results = read_results(reproduce.RESULTS)
    found = {(training.command, training.seed) for training in results.trainings}
    assert found == {(command, seed) for command, seeds in reproduce.PUBLISHED.items() for seed in seeds}
    assert [(ranking.command, ranking.seed) for ranking in results.rankings] == [*reproduce.RIVALS]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_follows_every_figure_it_shows(name):
    """No figure is typed in by hand: the text changes with the results."""
    text = f"before\n<!-- table {name} -->\nold\n<!-- end -->\nafter"
    first = written(text, RESULTS)
    assert first.startswith("before\n") and first.endswith("\nafter") and "old" not in first
    assert written(first, RESULTS) == first
    learned = {"fd": 7.0, "precision": 0.1, "recall": 0.6, "coverage": 0.7}
    other = dataclasses.replace(TRAINING, rows=TRAINING.rows | {"learned": learned})
    ranked = dataclasses.replace(RANKING, standings=[dataclasses.replace(STANDING, recall=0.1)])
    assert written(first, Results([other], [ranked])) != first


def test_a_table_may_be_of_one_command():
    text = "<!-- table priors of mnist5k -->\nold\n<!-- end -->"
    others = Ranking("mnist", 0, [dataclasses.replace(STANDING, prior="another")], "abc", "a CPU")
    found = written(text, RESULTS.with_ranking(others))
    assert found == written(text, RESULTS) and "PixelSNAIL" in found
    with pytest.raises(UserError, match="'mnist5k', of which there are no results"):
        written(text, Results())


def test_figures_of_several_seeds_are_a_mean_and_a_standard_deviation():
    other = dataclasses.replace(TRAINING, seed=1, gap_closed=0.7, rows=TRAINING.rows | {"learned": {"fd": 8.0}})
    heading, cells = summary([TRAINING, other])
    row = dict(zip(heading, cells))
    assert row["learned"] == "7.00 ± 1.41" and row["gap closed"] == "0.600 ± 0.141"
    assert row["seeds"] == "2"


def test_a_row_that_one_seed_lacks_has_a_dash_and_a_tuned_one_is_the_learned_where_nothing_was_better():
    as_fitted = {name: row for name, row in TRAINING.rows.items() if name != "tuned"}
    bare = dataclasses.replace(TRAINING, rows=as_fitted)
    assert bare.figure("tuned", "fd") == 6.0
    nothing = dataclasses.replace(TRAINING, seed=1, rows={})
    assert "–" in markdown(summary([TRAINING, nothing]))


def test_a_training_made_again_replaces_its_figures_in_place(tmp_path):
    first, second = TRAINING, dataclasses.replace(TRAINING, command="mnist")
    both = RESULTS.with_training(second)
    again = dataclasses.replace(first, gap_closed=0.9)
    found = both.with_training(again).with_training(dataclasses.replace(first, seed=1))
    assert found.trainings == [again, dataclasses.replace(first, seed=1), second] and found.rankings == [RANKING]
    write_results(tmp_path / "results.json", found)
    assert read_results(tmp_path / "results.json") == found


@pytest.mark.parametrize("content", ["{", "[1]", '{"trainings": [{"command": 3}]}', "null"])
def test_a_damaged_file_of_results_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UserError, match="results.json"):
        read_results(path)


def test_an_unknown_table_is_refused():
    with pytest.raises(UserError, match="no table 'other'"):
        written("<!-- table other -->\n<!-- end -->", Results())


def test_a_finished_run_becomes_a_row(run, monkeypatch, tmp_path, small_data):
    """The figures are the comparison's own; the seconds are those of the phases and of the comparison."""
    comparison = compared(run, small_splits((1, 28, 28), 4))
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(reproduce, "DOCUMENTS", (tmp_path / "README.md",))
    (tmp_path / "README.md").write_text("<!-- table summary -->\n<!-- end -->\n")
    monkeypatch.chdir(tmp_path)
    asked = []

    def trained(command):
        asked.append(command)
        folder = tmp_path / command[command.index("--run") + 1]
        folder.parent.mkdir(parents=True)
        folder.symlink_to(run.folder)
        return type("Ended", (), {"returncode": 0})

    real = reproduce.subprocess.run
    monkeypatch.setattr(
        reproduce.subprocess,
        "run",
        lambda command, **how: trained(command) if command[0] == sys.executable else real(command, **how),
    )
    reproduce.main(["mnist --stage2.steps 4", "--seeds", "3", "--data", "somewhere"])
    assert asked[0][2:7] == ["pipelines.train_all", "mnist", "--stage2.steps", "4", "--seed"]
    assert asked[0][-2:] == ["--data.root", "somewhere"]
    (training,) = read_results(tmp_path / "results.json").trainings
    assert training.command == "mnist --stage2.steps 4" and training.seed == 3
    assert training.figure("learned", "fd") == comparison.priors["learned"].fd
    assert training.gap_closed == comparison.gap_closed
    assert [*training.seconds] == ["stage1", "stage2", "comparison"] and min(training.seconds.values()) > 0
    assert json.loads((tmp_path / "results.json").read_text())["trainings"][0]["hardware"].endswith("threads")
    assert "`mnist --stage2.steps 4`" in (tmp_path / "README.md").read_text()


def test_a_training_that_fails_ends_it_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda command, **how: type("Ended", (), {"returncode": 2}))
    with pytest.raises(UserError, match="train_all mnist5k --seed 0 .* ended with exit code 2"):
        reproduce.main(["mnist5k"])
    with pytest.raises(UserError, match="no preset 'mnits'"):
        reproduce.main(["mnits"])
