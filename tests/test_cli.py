from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

import miner_lens as ml
from miner_lens import demo
from miner_lens.cli import app
from miner_lens.cli.experiments import EXPERIMENTS


def call(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


def test_help_lists_the_commands() -> None:
    shown = call("--help")
    names = ("demo", "info", "mine", "select", "ablate", "domains", "attribute", "kinds", "lens")
    more = (
        "reproduce",
        "tune-lens",
        "compare",
        "convergence",
        "reach",
        "flow",
        "patch",
        "neuron",
        "experiment",
        "report",
        "evaluate",
        "attention",
        "layers",
        "stability",
        "recovery",
    )
    assert all(name in shown for name in (*names, *more))


def test_info() -> None:
    shown = call("info", "shapes")
    for fact in ("Qwen2VLForConditionalGeneration", "llm", "6", "384", "image", "video"):
        assert fact in shown
    rows = {line.split()[1]: line.split()[3:6:2] for line in shown.splitlines() if "384" in line}
    assert rows == {"llm": ["6", "384"], "vision": ["3", "384"], "projector": ["1", "384"]}


def test_sites(tmp_path: Path) -> None:
    scores, msns = tmp_path / "scores.safetensors", tmp_path / "msns"
    free = ("--metrics", "prob,mean,max")
    call("mine", "shapes", "--out", scores, "--limit", 2, "--site", "vision", *free)
    assert ml.ImportanceScores.load(scores).metrics == ("prob", "mean", "max")
    assert ml.ImportanceScores.load(scores).site == "vision"
    call("select", scores, "--out", msns, "--ratio", 0.1)
    neurons = msns / "neurons-image.safetensors"
    assert ml.NeuronSet.load(neurons).site == "vision"
    shown = call("ablate", "shapes", neurons, "--question", "what is it?")
    assert "ablated:" in shown
    assert "not one of its sites" in call(
        "mine", "shapes", "--out", tmp_path / "no", "--site", "audio", "--limit", 1, code=2
    )


def test_mine_select_ablate(tmp_path: Path) -> None:
    scores = tmp_path / "scores.safetensors"
    call("mine", "shapes", "--out", scores, "--limit", 4, "--batch-size", 2)
    assert ml.ImportanceScores.load(scores).samples == 4
    shown = call("select", scores, "--out", tmp_path / "msns", "--ratio", 0.2)
    assert "image: NeuronSet" in shown
    files = sorted((tmp_path / "msns").glob("neurons-*.safetensors"))
    assert [path.stem for path in files] == ["neurons-image", "neurons-special", "neurons-text"]
    (sample,) = ml.datasets.load("easy-vqa", limit=1)
    image, question = (part[part["type"]] for part in sample.messages[0]["content"])
    shown = call("ablate", "shapes", *files, "--question", question, "--image", image)
    assert f"intact:  {sample.answers[0]}" in shown
    assert "ablated:" in shown
    by_value = call("ablate", "shapes", files[0], "--question", question, "--value", "0.5")
    assert "intact:" in by_value


def test_domains(tmp_path: Path) -> None:
    arguments = ["domains", "shapes", "easy-vqa", "digits", "--limit", 6, "--top-rate", 0.05]
    sites = ["--site", "llm", "--site", "vision"]
    shown = call(*arguments, *sites, "--out", tmp_path, "--tried", 2)
    assert "digits: NeuronSet" in shown
    assert "digits in llm+vision" in shown
    counts = ml.DomainCounts.load(tmp_path / "counts-vision.safetensors")
    assert counts.domains == ("digits", "easy-vqa")
    chosen = ml.NeuronSet.load(tmp_path / "neurons-vision-digits.safetensors")
    assert chosen == counts.select(0.05)["digits"]
    assert set(pd.read_csv(tmp_path / "matrix.csv")["on"]) == {"digits", "easy-vqa"}
    shown = call("domains", "shapes", "text-domains", "--limit", 8, "--out", tmp_path / "text")
    assert "arithmetic: NeuronSet" in shown
    alone = call("domains", "shapes", "easy-vqa", "--limit", 2, "--out", tmp_path / "one", code=2)
    assert "one domain among several" in alone


def test_stability(tmp_path: Path) -> None:
    small = ("--limit", 4, "--parts", 2, "--ratio", 0.05, "--out", tmp_path)
    shown = call("stability", "shapes", "easy-vqa", "digits", *small)
    found = ml.experiments.Stability.load(tmp_path / "stability.safetensors")
    assert found.summary in shown
    assert "image in easy-vqa and digits" in shown
    assert list(found.matrix("image")) == ["easy-vqa", "digits"]
    assert len(pd.read_csv(tmp_path / "stability.csv")) == len(found.frame)
    assert (tmp_path / "stability.png").read_bytes().startswith(b"\x89PNG")
    one = call("stability", "shapes", "easy-vqa", *small, "--parts", 1, code=2)
    assert "4 samples make from 2 to as many parts, not 1." in one


def test_experiment(tmp_path: Path) -> None:
    data = ["shapes", "easy-vqa:image", "easy-vqa:text"]
    small = ["--mined", 4, "--limit", 4, "--out", tmp_path, "--checkpoint", tmp_path / "kept"]
    how = ("--ratio", 0.1, "--metric", "begins", "--conditions-per-batch", 3)
    shown = call("experiment", "specificity", *data, *small, *how)
    assert "specificity index" in shown
    found = ml.experiments.Specificity.load(tmp_path / "specificity.safetensors")
    assert found.summary in shown
    assert list(found.matrix().columns) == ["image", "text"]
    assert len(pd.read_csv(tmp_path / "specificity.csv")) == len(found.frame)
    assert (tmp_path / "specificity.png").read_bytes().startswith(b"\x89PNG")
    assert "no experiment 'luck'" in call("experiment", "luck", *data, *small, code=2)
    other = ("--metric", "luck")
    assert "not 'luck'" in call("experiment", "specificity", *data, *small, *other, code=2)
    given = ("--scores", tmp_path / "scores.safetensors")
    assert "leave --scores out" in call("experiment", "transfer", *data, *small, *given, code=2)


def test_what_switches_nothing_off(tmp_path: Path) -> None:
    scores = tmp_path / "scores.safetensors"
    call("mine", "shapes", "--out", scores, "--limit", 2)
    shown = call("layers", scores, "--out", tmp_path, "--ratio", 0.05)
    assert "Of the neurons of each modality" in shown
    assert "Neurons in exactly these sets" in shown
    chosen = ml.ImportanceScores.load(scores).select(0.05)
    chosen["image"].save(tmp_path / "image.safetensors")
    answered = ("--metric", "containment", "--limit", 2, "--max-new-tokens", 2)
    off = ("--neurons", tmp_path / "image.safetensors")
    shown = call("evaluate", "shapes", "easy-vqa", *answered, *off, "--out", tmp_path)
    assert "containment" in shown
    assert len(pd.read_csv(tmp_path / "evaluation.csv")) == 2
    shown = call("attention", "shapes", "easy-vqa", "--limit", 2, "--out", tmp_path)
    assert "attn_q correlates with the mean" in shown
    parts = ("--limit", 4, "--parts", 2, "--repeats", 1)
    shown = call("stability", "shapes", "easy-vqa", *parts, "--out", tmp_path)
    assert "two halves of the samples" in shown
    frame = ml.experiments.Stability.load(tmp_path / "stability.safetensors").frame
    assert set(pd.read_csv(tmp_path / "stability.csv").columns) == set(frame.columns)
    for name in ("layers", "overlap", "attention-effect", "stability", "evaluation"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    many = ("stability", "shapes", "easy-vqa", "--limit", 2, "--parts", 3, "--out", tmp_path)
    assert "2 samples make from 2 to as many parts" in call(*many, code=2)


def test_recovery(tmp_path: Path) -> None:
    shown = call("recovery", "--case", "plain", "--seeds", 1, "--out", tmp_path)
    assert "plain: prob by contrastive, 1.00" in shown
    assert set(pd.read_csv(tmp_path / "recovery.csv")["case"]) == {"plain"}
    assert "no case 'luck'" in call("recovery", "--case", "luck", "--out", tmp_path, code=2)


def test_each_experiment_is_there_with_its_options() -> None:
    for name, options in EXPERIMENTS.items():
        made = getattr(ml.experiments, name.replace("-", "_"))
        assert set(options) <= set(inspect.signature(made).parameters)


def test_lens(tmp_path: Path) -> None:
    shown = call("lens", "shapes", "easy-vqa:both", "--limit", 6, "--out", tmp_path)
    assert "image: entropy changes course at" in shown
    assert ml.LogitLens.load(tmp_path / "lens.safetensors").values.shape[:2] == (6, 6)
    assert len(pd.read_csv(tmp_path / "curves.csv")) % 18 == 0
    for measure in ("entropy", "answer", "agreement"):
        assert (tmp_path / f"{measure}.png").read_bytes().startswith(b"\x89PNG")


def test_tune_lens(tmp_path: Path) -> None:
    arguments = ["tune-lens", "shapes", "easy-vqa", "--limit", 4, "--tried", 2]
    assert "image, tuned" in call(*arguments, "--out", tmp_path)
    assert set(pd.read_csv(tmp_path / "curves.csv")["measure"]) == {"plain", "tuned"}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    tuned = tmp_path / "lens.safetensors"
    assert ml.TunedLens.load(tuned).weights.shape[0] == 5
    through = ("lens", "shapes", "easy-vqa", "--limit", 2, "--tuned", tuned)
    assert "LogitLens(2 samples" in call(*through, "--out", tmp_path / "lens")


def test_attribute_and_kinds(tmp_path: Path) -> None:
    scores = tmp_path / "scores.safetensors"
    arguments = ["attribute", "shapes", "easy-vqa", "--limit", 2, "--out", scores]
    assert "attribution" in call(*arguments)
    assert "contribution" in call(*arguments, "--by", "contribution")
    call("select", scores, "--out", tmp_path / "neurons", "--ratio", 0.01)
    assert "--by is gradient, integrated" in call(*arguments, "--by", "magic", code=2)
    shown = call("kinds", "shapes", "easy-vqa", "--limit", 3, "--out", tmp_path / "kinds")
    assert "multimodal" in shown
    chosen = ml.NeuronKinds.load(tmp_path / "kinds" / "kinds.safetensors").select()["text"]
    assert ml.NeuronSet.load(tmp_path / "kinds" / "neurons-text.safetensors") == chosen


def test_compare(tmp_path: Path) -> None:
    data = ["compare", "shapes", "easy-vqa:image", "easy-vqa:text"]
    shown = call(*data, "--mined", 4, "--limit", 3, "--ratio", 0.1, "--out", tmp_path)
    found = ml.experiments.MetricComparison.load(tmp_path / "comparison.safetensors")
    assert found.summary in shown
    assert set(pd.read_csv(tmp_path / "agreement.csv")["metric"]) >= {"attn_k", "attribution"}
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_convergence(tmp_path: Path) -> None:
    arguments = ["convergence", "shapes", "easy-vqa", "--limit", 6, "--shuffles", 2, "--layer", 3]
    shown = call(*arguments, "--out", tmp_path)
    assert "separability" in shown
    assert set(ml.HiddenStates.load(tmp_path / "states.safetensors").modalities) > {"image"}
    assert len(pd.read_csv(tmp_path / "curves.csv")) == 6 * (3 * 3 + 3)
    for name in ("cka", "dimension", "layer-3"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_reach(tmp_path: Path) -> None:
    arguments = ["reach", "shapes", "easy-vqa", "--limit", 3, "--shuffles", 2]
    assert "probing of image" in call(*arguments, "--out", tmp_path)
    assert ml.SemanticReach.load(tmp_path / "reach.safetensors").curves().shape[0] == 12
    assert set(pd.read_csv(tmp_path / "curves.csv")["measure"]) == {"probing", "telomeres"}
    for name in ("probing", "telomeres"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_flow(tmp_path: Path) -> None:
    arguments = ["flow", "shapes", "easy-vqa", "--limit", 3, "--window", 5]
    shown = call(*arguments, "--out", tmp_path)
    assert "image in layers 0 to 4" in shown
    assert "AttentionFlow(3 samples, 6 layers" in shown
    assert len(ml.InformationFlow.load(tmp_path / "flow.safetensors").cuts) == 2
    assert set(pd.read_csv(tmp_path / "flow.csv")["layer"]) == {0, 1}
    assert set(pd.read_csv(tmp_path / "attention.csv")["measure"]) == {"effect", "saliency"}
    for name in ("flow-logprob", "attention-effect"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    off = tmp_path / "off.safetensors"
    ml.NeuronSet(
        [(layer, n) for layer in range(6) for n in range(384)], layers=6, neurons=384
    ).save(off)
    call(*arguments, "--neurons", off, "--out", tmp_path / "off")
    intact = ml.AttentionFlow.load(tmp_path / "attention.safetensors")
    assert not intact.values.equal(
        ml.AttentionFlow.load(tmp_path / "off" / "attention.safetensors").values
    )


def test_neuron(tmp_path: Path) -> None:
    arguments = ["neuron", "shapes", 3, 17, "--limit", 3, "--k", 2]
    shown = call(*arguments, "--out", tmp_path / "card.safetensors")
    assert "Neuron 17 of layer 3, on 3 samples." in shown
    assert "attribution" in shown
    assert shown.count("\npromotes '") == 2
    assert len(ml.NeuronCard.load(tmp_path / "card.safetensors").moments) == 2
    assert "lies outside" in call("neuron", "shapes", 6, 0, "--limit", 1, code=2)


def test_report(tmp_path: Path) -> None:
    msns = ml.NeuronSet([(0, 1), (1, 2)], layers=2, neurons=4)
    ml.experiments.overlap({"image": msns}).save(tmp_path / "shared.safetensors")
    msns.save(tmp_path / "image.safetensors")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    out = tmp_path / "page.html"
    files = [tmp_path / name for name in ("shared.safetensors", "image.safetensors", "table.csv")]
    assert "page.html" in call("report", *files, "--out", out)
    text = out.read_text()
    assert all(f">{name}</h2>" in text for name in ("shared", "image", "table"))
    assert "There is no file" in call("report", tmp_path / "none.safetensors", code=2)
    (tmp_path / "broken.safetensors").write_bytes(b"?")
    assert "not a complete" in call("report", tmp_path / "broken.safetensors", code=2)


def test_patch(tmp_path: Path) -> None:
    arguments = ["patch", "shapes", "easy-vqa", "--limit", 150, "--pairs", 2]
    assert "mean logit difference" in call(*arguments, "--out", tmp_path)
    assert (tmp_path / "restored.png").read_bytes().startswith(b"\x89PNG")
    assert set(pd.read_csv(tmp_path / "curves.csv")["layer"]) == set(range(6))
    assert "There is no pair" in call(*arguments, "--limit", 2, "--out", tmp_path, code=2)


def test_errors_are_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "scores.safetensors"
    broken.write_bytes(b"?")
    assert "error:" in call("select", broken, "--out", tmp_path, code=2)
    shown = call("mine", "shapes", "--out", broken, "--data", "nothing", code=2)
    assert "easy-vqa" in shown
    assert broken.read_bytes() == b"?"


def test_results_are_not_lost_or_mixed(tmp_path: Path) -> None:
    assert "is a folder" in call("mine", "shapes", "--out", tmp_path, "--limit", 2, code=2)
    scores = tmp_path / "new" / "scores.safetensors"
    call("mine", "shapes", "--out", scores, "--limit", 2)
    call("select", scores, "--out", tmp_path / "msns", "--ratio", 0.1)
    shown = call("select", scores, "--out", tmp_path / "msns", "--strategy", "random", code=2)
    assert "holds another selection" in shown
    assert "error:" in call("demo", "--out", tmp_path / "demo", "--samples", 0, code=2)


@pytest.mark.parametrize(("organism", "medium"), [("shapes", "image"), ("speech", "audio")])
def test_demo(organism: str, medium: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RATIOS", (0.0001, 0.02, 0.2))
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    shown = " ".join(
        call("demo", "--out", tmp_path, "--samples", 12, "--organism", organism).split()
    )
    for sentence in (
        f"Asked about the {medium}, switching off all MSNs at 2.0% costs 0.",
        f"Asked about the text, switching off {medium} MSNs",
        f"Switching off {medium} MSNs at 2.0% costs {medium} questions 0.",
        "said of all 20 comparisons together",
        "That took",
        "The report is",
    ):
        assert (sentence in shown) == ("text, switching off " + medium not in sentence)
    assert [path.name for path in tmp_path.iterdir()] == [organism]
    out = tmp_path / organism
    table = pd.read_csv(out / "summary.csv")
    rows = {
        (one.input, one.off, one.ratio): one.neurons
        for one in table[table["ratio"].notna()].itertuples()
    }
    every = {"all MSNs", "random, as all", "layer-matched, as all"}
    for ask in (medium, "text"):
        at = {r: {off for i, off, ratio in rows if (i, ratio) == (ask, r)} for r in (0.02, 0.2)}
        own = {f"{one} MSNs" for one in (medium, "text", "special")}
        assert at[0.2] == every | own
        assert at[0.02] == every | own | {f"layer-matched, as {ask}"}
        for ratio in (0.02, 0.2):
            for control in ("random, as all", "layer-matched, as all"):
                assert rows[ask, control, ratio] == rows[ask, "all MSNs", ratio]
    assert len(table) == 2 * len(rows) + 2 * 2
    assert set(table.loc[table["off"] == "random, as all", "seeds"]) == {1, 2}
    trials = pd.read_csv(out / "trials.csv.gz")
    assert len(trials) == 2 * 12 * (1 + 3 + 1 + 2 + 2 + 2 + 6)
    intact = trials[trials["condition"] == "intact"].groupby("label")["correct"].mean()
    nothing = table[(table["off"] == "nothing") & (table["measure"] == "correct")]
    assert dict(zip(nothing["input"], nothing["value"], strict=True)) == dict(intact)
    assert len(pd.read_csv(out / "controls.csv")) == 20
    assert len(pd.read_csv(out / "specificity.csv")) == 4
    for name in ("accuracy", "logprob", "neurons"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert f"miner-lens demo on {organism}" in page
    for name in ("scores", "neurons", f"asked about the {medium}", "asked about the text", "costs"):
        assert f">{name}<" in page
    assert page.count("The neuron's card") == 2
    assert f'data-kind="{medium}"' in page
    assert "<li>Random neurons are drawn by seeds 0, 1." in page
    loaded = ml.NeuronSet.load(out / f"neurons-{medium}.safetensors")
    scores = ml.ImportanceScores.load(out / "scores.safetensors")
    assert loaded == scores.select(0.02)[medium]


def test_demo_shows_a_real_language_model_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, Path]] = []
    with monkeypatch.context() as patch:
        patch.setattr(demo, "run_demo", lambda name, out, samples: shown.append((name, out)))
        call("demo", "--out", tmp_path)
    name = "smol-vl" if "smol-vl" in ml.organisms.names() else "shapes"
    assert shown == [(name, tmp_path / name)]
    assert "no organism 'tastes'" in call("demo", "--organism", "tastes", code=2)
    too_few = call("demo", "--out", tmp_path, "--organism", "shapes", "--samples", 1, code=2)
    assert "at least two samples" in too_few
