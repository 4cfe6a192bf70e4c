"""All methods on somebody's data: one folder, one recommendation that follows from the figures, nothing lost."""

import base64
import json
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

from common import compare
from common.cli import UserError, write_json
from common.demo import write_corpus

FLAGS = ["--demo", "--methods", "NEW_HEAD", "PEFT_LORA", "--epochs", "2", "--max_train_samples", "300"]
FLAGS += ["--max_test_samples", "60", "--seeds", "3", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one small comparison leaves."""
    place = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
        advised = compare.main([*FLAGS, "--output-dir", str(place / "demo")])
    assert advised in (place / "demo" / "report.md").read_text()
    return place / "demo"


@pytest.fixture
def calls(monkeypatch):
    """No script runs: the names of those that would have."""
    names = []
    monkeypatch.setattr(compare, "run_script", lambda name, flags: names.append(name) or f"error: {name} is broken")
    return names


def test_the_report_has_all_that_is_needed_to_decide(folder):
    report = (folder / "report.md").read_text()
    assert report.startswith("# Which method?\n\n**Take ")
    for name in ("NEW_HEAD", "PEFT_LORA"):
        record = json.loads((folder / name / "results.json").read_text())
        accuracy = record["summary"]["test_accuracy"]
        row = next(line for line in report.splitlines() if line.startswith(f"| [{name}]({name}/results.json) |"))
        assert f"| {100 * accuracy['mean']:.1f} ± {100 * accuracy['sd']:.1f} |" in row
        assert [run["seed"] for run in record["runs"]] == [3, 4]
    for title in ("majority class |  | 50.0", "TF-IDF + logistic regression |", "linear probe on the mean |"):
        assert f"\n| {title}" in report
    assert re.search(r"- \w+ over \w+: \+\d+\.\d points, 95% interval", report)
    for link in re.findall(r"\]\((.+?)\)", report):
        assert (folder / link).exists()
    assert {"comparison.png", "confusion.png", "PEFT_LORA/line_chart.png"} <= {*re.findall(r"\]\((.+?)\)", report)}
    assert not [place for place in (str(folder), str(compare.ROOT), os.environ["HOME"]) if f"{place}/" in report]


def test_the_texts_that_are_confidently_wrong_are_test_texts_with_their_own_label(folder):
    labels = {compare.plain(compare.clean(row["text"])): row["label"] for row in write_corpus()[1]}
    rows = re.findall(r"\| (\w+) \| (\w+) \| (0\.\d+) \| (.+) \|", (folder / "report.md").read_text())
    assert len(rows) == 10
    for true, predicted, _, text in rows:
        assert true != predicted and labels[text] == true
    probabilities = [float(row[2]) for row in rows]
    assert probabilities == sorted(probabilities, reverse=True) and probabilities[0] > 0.5


def test_resume_repeats_nothing_and_a_failure_loses_nothing(folder, calls, capsys):
    again = [*FLAGS, "--output_dir", str(folder), "--resume"]
    before = (folder / "report.md").read_text()
    compare.main(again)
    assert calls == []
    assert (folder / "report.md").read_text() == before.replace("`: 270", " --resume`: 270").replace("-dir", "_dir")
    assert f"Report: {folder / 'report.md'}" in capsys.readouterr().out
    with pytest.raises(UserError, match="--resume: the interrupted run had --lora_r 16, not 8"):
        compare.main([*again, "--methods", "PEFT_LORA", "--lora_r", "8"])
    assert calls == []

    record = (folder / "PEFT_LORA" / "results.json").rename(folder / "moved")
    with pytest.raises(SystemExit, match="error: did not finish: PEFT_LORA"):
        compare.main(again)
    assert calls == ["PEFT_LORA"]
    report = (folder / "report.md").read_text()
    assert "- PEFT_LORA did not finish: error: PEFT\\_LORA is broken\n" in report
    assert "| [NEW_HEAD]" in report and "| [PEFT_LORA]" not in report
    with pytest.raises(SystemExit, match="NEW_HEAD, PEFT_LORA"):
        compare.main(again[:-1])
    assert calls == ["PEFT_LORA", "NEW_HEAD", "PEFT_LORA"], "without --resume everything runs anew"
    assert "No method finished" in (folder / "report.md").read_text()
    record.rename(folder / "PEFT_LORA" / "results.json")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--lora_r", "8"], "NEW_HEAD/train.py: error: unrecognized arguments: --lora_r 8"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--methods", "ALL"], "invalid choice: 'ALL'"),
    ],
)
def test_a_wrong_flag_starts_nothing(flags, reason, calls, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        compare.main([*flags, "--output_dir", str(tmp_path / "results")])
    assert ended.value.code == 2 and reason in capsys.readouterr().err
    assert calls == [] and not (tmp_path / "results").exists()


def test_a_part_of_the_texts_does_not_replace_what_all_of_them_gave(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        compare.main(["--demo", "--methods", "NEW_HEAD", "--max_train_samples", "200"])
    assert [path.name for path in (tmp_path / "runs" / "compare").iterdir()] == ["demo_partial"]


def test_data_that_cannot_be_read_start_nothing(calls, tmp_path, demo):
    flags = ["--model", str(demo[0]), "--max_length", "64", "--output_dir", str(tmp_path / "results")]
    for wrong, reason in ((["--dataset", "./none"], "no such folder"), (["--batch_size", "-1"], "greater than 0")):
        with pytest.raises(UserError, match=reason):
            compare.main([*flags, *wrong])
    assert calls == [] and not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]


def write_script(root, code):
    (root / "A").mkdir()
    (root / "A" / "train.py").write_text(f"import os, sys, time\n{code}")


def test_a_script_that_fails_is_told_by_its_last_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    write_script(
        tmp_path, f"print('working'); sys.exit('first\\nerror: {tmp_path}/x.csv is odd' if sys.argv[1:] else 0)"
    )
    assert compare.run_script("A", []) is None
    assert compare.run_script("A", ["--flag"]) == "error: x.csv is odd (exit status 1)"
    out, err = capfd.readouterr()
    assert out == "working\n" * 2 and err == f"first\nerror: {tmp_path}/x.csv is odd\n"


def test_ctrl_c_ends_the_script_too_and_is_told_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    write_script(
        tmp_path,
        "import signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('Interrupted, says the script'))\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"  # as Ctrl-C does to both
        "time.sleep(60)",
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(SystemExit) as ended:
            compare.run(lambda: compare.run_script("A", []))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line == "Interrupted. A training goes on after its last checkpoint with --resume."
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_rest_takes_as_long_as_its_passes_through_the_backbone(tmp_path, monkeypatch, capsys):
    configs = {name: SimpleNamespace(epochs=10, output_dir=tmp_path / name) for name in compare.METHODS}

    def run_script(name, flags):
        if name == "PEFT_LORA":
            return "error"
        (tmp_path / name).mkdir()
        seconds = 30 if name == "NEW_HEAD" else 100
        write_json({"runs": [{"total_seconds": seconds}] * 2}, tmp_path / name / "results.json")

    monkeypatch.setattr(compare, "PASSES", {"NEW_HEAD": 0, "LAST_LAYER": 1, "PEFT_LORA": 2, "PEFT_QLORA": 2})
    monkeypatch.setattr(compare, "run_script", run_script)
    monkeypatch.setattr(compare, "is_finished", lambda name, *_: (tmp_path / name).exists())
    assert compare.run_scripts(configs, configs, "") == {"PEFT_LORA": "error"}
    assert capsys.readouterr().out.splitlines() == [
        "[1/4] NEW_HEAD",
        "[2/4] LAST_LAYER; about 16 minutes to go",  # 62 passes at 60 / 4 seconds
        "[3/4] PEFT_LORA; about 12 minutes to go",  # 48 passes at 260 / 18
        "[4/4] PEFT_QLORA; about 6 minutes to go",
    ]
    assert compare.run_scripts(configs, configs, "") == {"PEFT_LORA": "error"}
    assert capsys.readouterr().out.splitlines() == [
        "Finished by an earlier run: NEW_HEAD, LAST_LAYER, PEFT_QLORA",
        "[1/1] PEFT_LORA; about 4 minutes to go",  # 24 passes at 460 / 42
    ]


def made(accuracies, seconds, reviews=1000):
    """A record, and its right answers: the easiest reviews."""
    right = [base64.b64encode(np.packbits(np.arange(reviews) < score * reviews)).decode() for score in accuracies]
    sd = np.std(accuracies, ddof=1) if len(accuracies) > 1 else None
    record = {
        "dataset": {"test": reviews},
        "runs": [{"test": {"accuracy": score}} for score in accuracies],
        "summary": {
            "test_accuracy": {"mean": np.mean(accuracies), "sd": sd},
            "train_seconds": {"mean": seconds, "sd": None},
        },
    }
    return record, {"runs": [{"test_reviews": reviews, "right": bits} for bits in right]}


def advise(references=(("TF-IDF", 0.7),), **methods):
    records, answers = ({name: parts[place] for name, parts in methods.items()} for place in (0, 1))
    return compare.recommend(records, answers, [{"name": name, "accuracy": score} for name, score in references])


def test_the_recommendation_is_the_cheapest_that_is_not_clearly_worse():
    slow = made([0.9, 0.9], 100)
    clearly = advise(slow=slow, fast=made([0.85, 0.85], 10))
    assert clearly == (
        "**Take slow.** Of the 1,000 test texts it gets right 90.0 ± 0.0% after 100.0 s of training: the most "
        "accurate of the methods, and no faster one is level with it. "
        "The best cheap reference, TF-IDF, gets 70.0%, which is less."
    )
    close = advise(slow=slow, fast=made([0.905, 0.893], 10))
    assert close.startswith(
        "**Take fast.** Of the 1,000 test texts it gets right 89.9 ± 0.8% after 10.0 s of training:"
    )
    assert "slow gets 90.0 ± 0.0% after 100.0 s of training, which is not clearly more." in close
    within_sd = advise(slow=made([0.95, 0.9] * 8, 100), fast=made([0.905] * 16, 10))
    assert within_sd.startswith("**Take fast.**")
    assert advise(slow=slow, fast=made([0.85], 10), other=made([0.9], 50)).startswith("**Take other.**")
    assert "no faster" not in advise(slow=slow) and "reference" not in advise((), slow=slow)
    assert compare.recommend({}, {}, []).startswith("No method finished")


def test_a_cheap_reference_that_is_as_good_is_recommended_instead():
    methods = {"slow": made([0.9, 0.9], 100), "fast": made([0.8, 0.8], 10)}
    for score, taken in ((0.899, "slow"), (0.9, "TF-IDF"), (0.95, "TF-IDF")):
        assert advise([("TF-IDF", score)], **methods).startswith(f"**Take {taken}.**")
    instead = advise([("TF-IDF", 0.95)], **methods)
    assert "Of the methods slow would be the one to take; it gets 90.0 ± 0.0% after 100.0 s of training." in instead
    assert advise([(compare.MAJORITY, 0.95)], **methods).startswith("**Take none of these.** Always answering")


def test_a_method_below_a_reference_is_not_recommended_where_another_is_above():
    few = {"slow": made([0.9], 100, reviews=60), "fast": made([0.85], 10, reviews=60)}  # level: 54 and 51 of 60
    assert advise([("TF-IDF", 0.8)], **few).startswith("**Take fast.**")
    advised = advise([("TF-IDF", 0.86)], **few)
    assert advised.startswith("**Take slow.** Of the 60 test texts it gets right 90.0% after 100.0 s of training:")
    assert "and no faster one that is level with it beats the reference." in advised
    assert advise([("TF-IDF", 0.9)], **few).startswith("**Take TF-IDF.**")


def test_three_classes_in_table_and_picture(tmp_path):
    labels, classes = np.array([0, 0, 1, 2]), ["a|b", "$x$", "c" * 40]
    logits = np.eye(3)[np.array([[0, 1, 1, 1], [0, 0, 1, 1]])]
    first, second, third = compare.by_class({"A": logits}, labels, classes).splitlines()[2:]
    assert first == r"| a\|b | 2 | 100.0 / 75.0 / 85.7 |"
    assert second.endswith("| 1 | 40.0 / 100.0 / 57.1 |") and third.endswith("| 1 | 0.0 / 0.0 / 0.0 |")
    counts = [[[1, 1, 0], [0, 1, 0], [0, 1, 0]], [[2, 0, 0], [0, 1, 0], [0, 1, 0]]]
    runs = [{"test": {"confusion_matrix": matrix}} for matrix in counts]
    records = [{"method": name, "config": {"demo": False}, "runs": runs} for name in "ABC"]
    figure = compare.confusion_figure(records, classes)
    assert [axes.get_title() for axes in figure.axes] == ["A", "B", "C"]
    assert figure.axes[2].images[0].get_array().tolist() == [[1.5, 0.5, 0], [0, 1, 0], [0, 1, 0]]
    assert {axes.images[0].get_clim()[0] for axes in figure.axes} == {0}
    assert figure.axes[0].get_ylabel() == "true" and figure.axes[0].get_xlabel() == "predicted"
    compare.save(figure, tmp_path / "confusion.png", records)
    assert imread(tmp_path / "confusion.png")[0, 0].tolist() == [1, 1, 1, 1]


def test_only_wrong_texts_are_shown_the_surest_first():
    labels = np.array([0, 0, 1, 1])
    logits = np.array([[[2.0, 0], [0, 1], [3, 0], [0, 4]]])
    lines = compare.confidently_wrong(logits, labels, ["right", "wrong", "very wrong", "right"], ["no", "yes"])
    assert lines.splitlines()[2:] == ["| yes | no | 0.953 | very wrong |", "| no | yes | 0.731 | wrong |"]
    assert compare.confidently_wrong(logits[:, :1], labels[:1], ["right"], ["no", "yes"]) == "None is wrong.\n"


def test_a_text_cannot_break_the_report():
    assert compare.plain("a\n\n# b | <b>c</b>\t![d](e) `f`") == r"a \# b \| \<b\>c\</b\> \!\[d\](e) \`f\`"
    assert compare.plain("x" * 400) == "x" * 300 + "…" and compare.plain("x" * 300) == "x" * 300


@pytest.mark.parametrize(
    ("line", "public"),
    [
        ("error: --dataset /data/me/reviews: no such folder", "error: --dataset reviews: no such folder"),
        ("OSError: '/data/me/x.csv', see https://a.org/b/c", "OSError: 'x.csv', see https://a.org/b/c"),
        ("--model ~/models/bert of org/name", "--model bert of org/name"),
        (f"in {compare.ROOT}/common/data.py", "in common/data.py"),
    ],
)
def test_no_folders_of_this_machine(line, public):
    assert compare.without_folders(line) == public
