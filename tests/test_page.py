"""The comparison page: self-contained, complete, and rendered without an error by a real browser where one is installed."""

import copy
import csv
import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from pipelines import compare, processes, studies
from pipelines.judging.compare import with_labels_read
from pipelines.judging.comparison import ROWS, from_dict, read_comparison
from pipelines.judging.features import FIGURES
from pipelines.judging.together import Entry, names_of
from pipelines.pages import report
from pipelines.pages.page import labels_read, unbroken
from pipelines.pages.plots import COLOURS, lines, nearest_plot, plain, png, projections, training_curves
from pipelines.pages.words import between_runs, cell, notes, verdict_in_words, verdict_of_several
from pipelines.runs.config import replaced
from pipelines.runs.options import Options
from pipelines.runs.phases import train
from pipelines.runs.recipes import preset
from pipelines.runs.run import TRAINED, Run
from pipelines.training.checkpoints import Moment
from stage2_prior.sampling import AS_FITTED
from stage2_prior.transformer import TransformerConfig
from tests.parts import SAVE_FIGURE, shrunk, small_splits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two runs of different kinds, another prior on the stage 1 of the first, and the page of all three, its plots with axes."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", SAVE_FIGURE)
        runs = []
        for name in ("mnist5k", "mnist-vqvae"):
            config = shrunk(preset(name))
            patch.setattr(type(config.data), "load", lambda self, report=None: small_splits((1, 28, 28), 4))
            runs.append(Run.create(folder / name, config, "cpu"))
            train(runs[-1])
        other = replaced(runs[0].config, "prior.backbone", TransformerConfig(width=8, layers=2, heads=2))
        runs.append(Run.create(folder / "attention", other, "cpu"))
        train(runs[-1], Options(device="cpu", stage1_from=str(runs[0].folder)))
        compare.main([*(str(run.folder) for run in runs), "--out", str(folder / "both.html"), "--device", "cpu"])
    return folder


def test_the_page_needs_nothing_else(compared):
    for page in (compared / "mnist5k/compare/page.html", compared / "both.html"):
        text = page.read_text()
        sources = re.findall(r'(?:src|href)="([^"]*)"', text)
        assert sources and all(source.startswith("data:") for source in sources)
        assert "http://" not in text and "https://" not in text
        start = "uniform codes" if page.stem == "both" else "N(0, I)"  # those that share a decoder have one picture
        assert all(heading in text for heading in (f"Samples: {start}", "Samples: learned prior", "Training", "What was run"))
    assert "Likelihood of 120 held-out images" in text and "Where the rate lies" in text
    assert "uniform codes" in text and "Use of the codes" in text
    assert all(
        f"Diversity traded for fidelity: {way}" in text for way in ("temperature", "guidance", "autoguidance", "rejection")
    )
    assert "Samples by label" in text


def test_the_page_names_the_command_that_made_it(compared):
    for page, runs in {"both.html": ["mnist5k", "attention", "mnist-vqvae"], "mnist5k/compare/page.html": ["mnist5k"]}.items():
        (names,) = re.findall(r"Made by python -m pipelines\.compare (.*?)\. ", (compared / page).read_text())
        assert sorted(names.split()) == sorted(runs)


def test_no_line_breaks_inside_of_an_option():
    line = unbroken("Train longer: train_all --run a-b --stage1.steps 120; or <another> --run.")
    assert line == (
        'Train longer: train_all <span class="option">--run</span> a-b <span class="option">--stage1.steps</span> 120; or'
        ' &lt;another&gt; <span class="option">--run</span>.'
    )


def test_a_prior_has_one_colour_in_all_plots():
    comparison = SimpleNamespace(title=ROWS.__getitem__)
    (axis,) = nearest_plot({name: torch.rand(9) for name in ("real", "learned", "posterior")}, comparison).axes
    assert [line.get_color() for line in axis.lines] == [COLOURS[name] for name in ("real", "learned", "posterior")]
    priors = ["standard", "gaussian", "mixture", "learned", "tuned"]
    figure = projections({name: torch.rand(9, 2) for name in (*priors, "posterior")}, comparison)
    for name, axis in zip(priors, figure.axes):
        drawn = [tuple(points.get_facecolor()[0]) for points in axis.collections]
        assert drawn == [to_rgba(COLOURS["posterior"]), to_rgba(COLOURS[name])]
    assert len({COLOURS[name] for name in (*priors, "posterior", "real")}) == 7


def test_of_several_processes_the_first_alone_draws_and_deletes(compared, monkeypatch):
    run = Run.open(str(compared / "mnist5k"), "cpu")
    there = {path: path.stat().st_mtime_ns for path in (run.folder / "compare").iterdir()}
    done = read_comparison(run.folder / "compare/metrics.json"), SimpleNamespace(seconds={}, training_seconds={})
    monkeypatch.setattr(report, "compare", lambda *given: done)
    monkeypatch.setattr(processes, "on_first", lambda action: None)  # as on another
    monkeypatch.setenv("RANK", "1")
    report.write_report(run, small_splits((1, 28, 28), 4), run.config.metrics)
    assert {path: path.stat().st_mtime_ns for path in (run.folder / "compare").iterdir()} == there


def test_json_csv_and_page_say_the_same(compared):
    for name in ("mnist5k", "mnist-vqvae"):
        folder = compared / name / "compare"
        metrics = json.loads((folder / "metrics.json").read_text())
        rows = {row["z"]: row for row in csv.DictReader(open(folder / "metrics.csv"))}
        page = (folder / "page.html").read_text()
        for prior, values in metrics["priors"].items():
            assert float(rows[prior]["fd"]) == values["fd"]
            assert all(float(rows[prior][figure]) == values[figure] for figure in FIGURES)
            assert all(float(rows[prior][f"{figure}_plus_minus"]) == values["plus_minus"][figure] for figure in FIGURES)
            assert f"<td>{values['fd']:.2f} ± {values['plus_minus']['fd']:.2f}</td>" in page
            assert rows[prior]["nll"] == "" or float(rows[prior]["nll"]) == values["nll"]
        for prior, values in metrics["likelihood"]["priors"].items():
            assert float(rows[prior]["negative_elbo"]) == values["negative_elbo"]["nats"]
            assert f"<td>{values['rate']['nats']:.2f}</td>" in page
        assert rows["learned"]["extractor"] == metrics["features"]["digest"]


def test_the_verdict_says_that_samples_are_copies(compared):
    values = json.loads((compared / "mnist5k/compare/metrics.json").read_text())
    for name, p, says in (("learned", 0.5, False), ("learned", 1e-9, True), ("standard", 1e-9, False)):
        changed = copy.deepcopy(values)
        changed["priors"]["learned"]["copying_p"] = 0.5
        changed["priors"].pop("tuned", None)
        changed.pop("gap_closed_tuned", None)
        changed["priors"][name] |= {"copying_p": p, "copied": 0.209}
        comparison = from_dict(changed)
        assert ("some samples may be copies: 20.9 %" in verdict_in_words(comparison)) == says
        assert any("More than by chance: look" in note for note in notes(comparison)) == says


def test_runs_of_the_same_images_are_compared_in_words_and_others_are_not(compared):
    together = json.loads((compared / "both.json").read_text())["runs"]
    assert list(together) == ["mnist5k", "mnist-vqvae", "attention"]
    assert [row["run"] for row in csv.DictReader(open(compared / "both.csv"))].count("mnist-vqvae") > 3
    (finding,) = between_runs({name: from_dict(values) for name, values in together.items()})
    assert finding in html.unescape((compared / "both.html").read_text())
    lower, _, higher = sorted(together, key=lambda run: together[run]["priors"]["learned"]["fd"])
    assert re.search(f"{lower}, drawn from the learned prior, at [\\d.]+ ± .*; {higher}, drawn from .*, at [\\d.]+ ± ", finding)

    together["plain"] = copy.deepcopy(together["mnist5k"])
    together["plain"]["priors"]["learned"] = {"note": "none"}
    together["other"] = copy.deepcopy(together["mnist5k"])
    together["other"]["features"]["reference"]["digest"] = "of other images"
    finding, warning = between_runs({name: from_dict(values) for name, values in together.items()})
    assert "plain, drawn from N(0, I), as a plain autoencoder is, at" in finding and "other" not in finding
    assert "Not everything here compares" in warning and warning.endswith("part mnist5k, mnist-vqvae, attention, plain; other.")


def test_priors_that_share_a_decoder_stand_in_one_table_sorted(compared):
    page, together = (compared / "both.html").read_text(), json.loads((compared / "both.json").read_text())
    (ranking,) = together["rankings"]
    assert page.count("<h2>") == 2 and "<h2>One decoder, 2 learned priors</h2>" in page
    section = page.split("2 learned priors</h2>")[1].split("<h2>")[0]
    assert "runs: PixelSNAIL of mnist5k; Transformer of attention." in section
    figures = ["fd", "precision", "recall", "coverage", "copied, %", "nll of z"]  # with the others it is wider than a screen
    added = ["nats above the best", "parameters", "s to train", "s per 1,000"]
    assert re.findall("<th>(.*?)</th>", section) == ["z is drawn from", *figures, *added]
    table = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr.*?</tr>", section, re.DOTALL)][1:]
    titles = [cells[0] for cells in table]
    assert titles[:3] == ["real images", "reconstructions", "posterior (not a generator)"] and len({*titles}) == len(titles)
    assert {"N(0, I)", "PixelSNAIL", "Transformer"} <= {*titles}
    distances = [float(cells[1].split(" ")[0]) for cells in table[3:]]
    assert distances == sorted(distances)
    assert section.count("data:image/png") == 2  # one picture of all, and the curves

    # The paired differences: zero for the best, and for the others those of the means.
    first, second = (from_dict(together["runs"][run]) for run in ("mnist5k", "attention"))
    nats = {first.title(name): row.nll for name, row in first.priors.items() if row.nll is not None and name != "learned"}
    nats |= {first.prior: first.priors["learned"].nll, second.prior: second.priors["learned"].nll}
    best = min(nats.values())
    found = {row["prior"]: row for row in ranking if row["nats_above_best"] is not None}
    assert found.keys() == nats.keys()
    for prior, row in found.items():
        assert row["nats_above_best"] == pytest.approx(nats[prior] - best, abs=1e-6)
        assert (row["nats_plus_minus"] > 0) == (nats[prior] > best)
    columns = {cells[0]: cells[-4:] for cells in table}
    assert columns["N(0, I)"][1] == "0" and columns["N(0, I)"][2] == ""  # nothing fitted, no time
    assert all(float(columns[name][2]) > 0 for name in ("PixelSNAIL", "Transformer"))
    assert int(columns["fitted Gaussian"][1].replace(",", "")) == 196 + 196 * 197 // 2


def test_priors_of_one_kind_are_told_apart_by_what_they_are_told_or_else_by_their_runs(compared):
    first = read_comparison(compared / "mnist5k/compare/metrics.json")
    runs = {"a": first, "b": first, "c": replace(first, prior="Transformer")}
    assert names_of(runs) == {"a": "PixelSNAIL (a)", "b": "PixelSNAIL (b)", "c": "Transformer"}
    runs |= {"none": replace(first, conditioned_on=None), "captions": replace(first, conditioned_on="caption")}
    assert names_of(runs) == {
        **{run: f"PixelSNAIL with labels ({run})" for run in ("a", "b")},
        "c": "Transformer",
        "none": "PixelSNAIL",
        "captions": "PixelSNAIL with captions",
    }


def test_copies_are_not_named_the_best_of_several(compared):
    comparison = read_comparison(compared / "mnist5k/compare/metrics.json")
    row = comparison.priors["learned"]
    honest = replace(row, fd=2.0, copying_p=0.5)
    copies = replace(row, fd=1.0, copying_p=1e-9, copied=0.4)

    def entry(key, row):
        return Entry(key, None, key, row, torch.zeros(1, 1, 4, 4), None, None, None)

    reconstruction = entry("reconstruction", row)
    said = verdict_of_several([reconstruction, entry("one", copies), entry("other", honest)])
    assert said.startswith("Of 2 ways to draw z for one decoder, other lies nearest")
    assert "one is left out: 40.0 % of its samples" in said and "other is left out" not in said
    assert verdict_of_several([reconstruction, entry("one", copies)]).endswith(
        "samples of every prior lie too near to training images."
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width", [400, 1100])
def test_a_browser_renders_it(compared, tmp_path, width):
    shot = tmp_path / "shot.png"
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    done = subprocess.run(
        [CHROMIUM, *arguments, f"--window-size={width},1500", f"--screenshot={shot}", (compared / "both.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shot.is_file(), done.stderr
    assert "CONSOLE" not in done.stderr
    assert len(np.unique(np.asarray(Image.open(shot).convert("L")))) > 20  # not a blank page


def test_plots_leave_the_backend_of_a_notebook_alone():
    """In a new process, which has imported no plots yet."""
    code = "import matplotlib; matplotlib.use('svg'); from matplotlib import pyplot; import torch, pipelines.pages.report, "
    code += ", ".join(f"pipelines.studies.{path.stem}" for path in Path(studies.__path__[0]).glob("[a-z]*.py"))
    code += "; from pipelines.pages.plots import lines, png; print(png(lines([('a', 1.0, torch.zeros(2, 1, 4, 4).byte())]))[1:4])"
    code += "; print(matplotlib.get_backend(), pyplot.get_fignums())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["b'PNG'", "svg []"]


def test_a_name_in_a_plot_is_no_formula():
    figure = Figure()
    axis = figure.subplots()
    axis.scatter([0], [0], label=plain("$\\frac$ \x1b"))
    axis.legend()
    assert png(figure).startswith(b"\x89PNG")


def test_labels_are_read_one_by_one():
    stored = read_comparison(TRAINED / "mnist5k/compare/metrics.json")
    unread = {name: replace(row, labels_read={}) for name, row in stored.rows.items()}
    priors = {name: row for name, row in unread.items() if name in stored.priors}
    comparison = replace(stored, real=unread["real"], reconstruction=unread["reconstruction"], priors=priors)
    subject = SimpleNamespace(labels=torch.tensor([0, 0, 1, 2]), splits=SimpleNamespace(label_names=["a", "b", "c", "none"]))
    rows = SimpleNamespace(seen={"real": SimpleNamespace(read=torch.tensor([0, 1, 1, 0]))})
    real = with_labels_read(subject, rows, comparison.rows)["real"]
    assert real.labels_read == {"a": 0.5, "b": 1.0, "c": 0.0} and real.label_read == 0.5
    assert labels_read(comparison) is None
    table = labels_read(replace(comparison, real=real, commonest=0.4))
    assert [(row.title, row.cells) for row in table.rows] == [("a", ["50.0"]), ("b", ["100.0"]), ("c", ["0.0"])]
    assert "right for 40.0 %" in table.notes[0]


def test_the_name_of_a_run_is_no_formula_in_a_plot():
    """Between dollars matplotlib reads one, and fails where it is none."""
    name = "run $\\frac$"
    history = [Moment(1, {"loss": 1.0}, {"loss": 1.0})]
    for figure in (training_curves({name: history}), lines([(name, 1.0, torch.zeros(2, 1, 4, 4, dtype=torch.uint8))])):
        assert png(figure).startswith(b"\x89PNG")


def test_the_part_of_the_gap_that_is_closed_is_said_as_one_of_nothing_to_all():
    comparison = read_comparison(TRAINED / "mnist5k" / "compare" / "metrics.json")
    worse = replace(comparison.priors["learned"], fd=2 * comparison.priors["standard"].fd)
    says = verdict_in_words(replace(comparison, priors=comparison.priors | {"learned": worse}, gap_closed=-1.0))
    assert "closes none of the gap" in says and cell(worse, "fd") in says
    more = verdict_in_words(replace(comparison, gap_closed=1.4, gap_closed_tuned=1.5))
    assert "closes all of the gap that N(0, I) leaves, and all of it when drawn with guidance" in more, "it cannot close more"


def test_the_tuned_row_is_recommended_unless_the_prior_as_fitted_is_better_beyond_the_error():
    comparison = read_comparison(TRAINED / "mnist5k" / "compare" / "metrics.json")
    fitted, how = comparison.priors["learned"].fd, comparison.priors["tuned"].sampling
    for fd, best in ((fitted + 0.01, "tuned"), (fitted + 5, "learned")):
        tuned = replace(comparison.priors["tuned"], fd=fd)
        other = replace(comparison, priors=comparison.priors | {"tuned": tuned})
        assert other.recommended == best and other.tuned(weaker=True) == (how if best == "tuned" else AS_FITTED)
