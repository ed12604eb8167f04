"""What a run belongs to, by content: data, weights, tokeniser, code; and whole records."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from bench.config.sections import DatasetConfig
from bench.data.texts import dataset_facts
from bench.run.identity import require_same, tokenizer_digest
from fedara_core.comm.base import Communicator
from fedara_core.errors import InputError
from fedara_core.methods.lora import Method
from support.in_turn import in_turn
from support.launch import TINY, Finished, fedara_here
from support.models import SIZES, write_model
from support.models import WORDS as KNOWN
from support.refused import sets

WORDS = KNOWN[4:]  # the others are special tokens, or look like them


def write_data(folder: Path, shift: int) -> None:
    """A data set of 40 + 20 texts; another shift gives other texts for the same labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, num_texts in (("train", 40), ("test", 20)):
        rows = [
            {"text": f"{WORDS[(i + shift) % len(WORDS)]} {WORDS[i % 5]}", "label": i % 2}
            for i in range(num_texts)
        ]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


def write_bert(folder: Path, seed: int) -> None:
    write_model(folder, transformers.BertConfig(**SIZES), seed=seed, pad_token="!")


def run(results: Path, *overrides: str) -> Finished:
    """`fedara run` on tests/tiny.toml, as a job that has read nothing yet."""
    dataset_facts.cache_clear()
    tokenizer_digest.cache_clear()
    shown = sets(["federation.num_rounds=3", *overrides])
    return fedara_here("run", TINY, "--results", results, *shown)


def only_run(results: Path) -> Path:
    (run_dir,) = (path for path in results.iterdir() if path.is_dir())
    return run_dir


def interrupt(run_dir: Path) -> None:
    """As if the run had ended after its last checkpoint."""
    (run_dir / "DONE").unlink()


def test_a_finished_run_is_not_taken_for_one_on_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folds lie in folders of the same name."""
    for fold in (0, 1):
        write_data(tmp_path / f"fold{fold}" / "data", shift=fold)
    monkeypatch.chdir(tmp_path / "fold0")
    assert run(tmp_path / "out", "dataset.name=file:data").code == 0
    first = json.loads((only_run(tmp_path / "out") / "run.json").read_text())["dataset_digest"]
    again = run(tmp_path / "out", "dataset.name=file:data")
    assert (again.code, "finished earlier, skipped\n" in again.out) == (0, True)
    monkeypatch.chdir(tmp_path / "fold1")
    other = run(tmp_path / "out", "dataset.name=file:data")
    assert (other.code, other.err.count("\n")) == (2, 1)
    second = dataset_facts(DatasetConfig(name="file:data")).digest
    assert f'dataset_digest is "{first}" there and "{second}" here' in other.err


@pytest.mark.parametrize("command", ["sweep", "reproduce"])
def test_no_command_takes_edited_data_for_those_of_the_record(command: str, tmp_path: Path) -> None:
    data, results = tmp_path / "data", tmp_path / "out"
    write_data(data, shift=0)
    assert run(results, f"dataset.name=file:{data}").code == 0
    with (data / "test.jsonl").open("a") as file:
        file.write('{"text": "rain", "label": 1}\n')
    dataset_facts.cache_clear()
    words = ["--set", f"dataset.name=file:{data}"]
    if command == "sweep":
        words += ["--set", "federation.num_rounds=3", "--results", str(results)]
        said = fedara_here("sweep", TINY, *words)
    else:
        said = fedara_here("reproduce", only_run(results), "--results", tmp_path / "again", *words)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "dataset_digest is" in said.err


def test_data_that_are_gone_are_said(tmp_path: Path) -> None:
    write_data(tmp_path / "data", shift=0)
    assert run(tmp_path / "out", f"dataset.name=file:{tmp_path / 'data'}").code == 0
    shutil.rmtree(tmp_path / "data")
    again = run(tmp_path / "out", f"dataset.name=file:{tmp_path / 'data'}")
    assert again.code == 0
    assert "skipped; not compared with data and model: dataset.name" in again.out


@pytest.mark.parametrize("state", ["finished", "interrupted"])
@pytest.mark.parametrize("changed", ["weights_digest", "tokenizer_digest"])
def test_a_model_folder_whose_files_were_replaced(changed: str, state: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_bert(model, seed=0)
    settings = [f"model.name={model}", "adapter.targets=['query']"]
    assert run(tmp_path / "out", *settings).code == 0
    run_dir = only_run(tmp_path / "out")
    if state == "interrupted":
        interrupt(run_dir)
    if changed == "weights_digest":
        write_bert(model, seed=1)
    else:
        file = model / "tokenizer.json"
        file.write_text(file.read_text().replace("soup", "salt"))
    before = (run_dir / "rounds.jsonl").read_bytes()
    other = run(tmp_path / "out", *settings)
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert f"{changed} is" in other.err
    assert "dataset_digest" not in other.err
    assert (run_dir / "rounds.jsonl").read_bytes() == before


def test_a_method_whose_results_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, "method.name=lora").code == 0
    monkeypatch.setattr(Method, "version", 2)
    other = run(tmp_path, "method.name=lora")
    assert other.code == 2
    assert "method_version is 1 there and 2 here" in other.err


def test_a_record_of_before_there_were_digests_is_skipped_as_before(tmp_path: Path) -> None:
    assert run(tmp_path).code == 0
    path = only_run(tmp_path) / "run.json"
    facts = json.loads(path.read_text())
    for key in ("weights_digest", "results_version", "method_version"):
        del facts[key]
    path.write_text(json.dumps(facts))
    assert "finished earlier, skipped\n" in run(tmp_path).out


def test_processes_that_differ_are_named() -> None:
    def refused(communicator: Communicator) -> str:
        digest = "abc" if communicator.world_rank != 1 else "def"
        own: dict[str, Any] = {"config": {"seed": 0}, "weights_digest": digest}
        with pytest.raises(InputError) as raised:
            require_same(own, communicator)
        return str(raised.value)

    said = in_turn(3, refused)
    assert said == [said[0]] * 3
    assert 'by world_rank: weights_digest is "abc" on 0, 2, "def" on 1;' in said[0]
    assert "config" not in said[0]


def test_processes_that_agree() -> None:
    in_turn(2, lambda communicator: require_same({"dataset_digest": "abc"}, communicator))


DAMAGE = {
    "gone": (lambda rows: None, "holds 0 of 3 rounds"),
    "short": (lambda rows: rows[:2], "holds 2 of 3 rounds"),
    "twice": (
        lambda rows: [rows[0], rows[0], rows[2]],
        "rounds.jsonl:2: round_index = 0; allowed: 0 to 2, each once",
    ),
    "cut": (lambda rows: [rows[0][:9], *rows[1:]], "rounds.jsonl:1: not valid JSON"),
    "list": (lambda rows: ["[]\n", *rows[1:]], "rounds.jsonl:1: no JSON object"),
}


@pytest.mark.parametrize("state", ["finished", "interrupted"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_rounds_that_are_not_there_are_never_done(damage: str, state: str, tmp_path: Path) -> None:
    assert run(tmp_path).code == 0
    run_dir = only_run(tmp_path)
    path = run_dir / "rounds.jsonl"
    change, wanted = DAMAGE[damage]
    left = change(path.read_text().splitlines(keepends=True))
    if left is None:
        path.unlink()
    else:
        path.write_text("".join(line if line.endswith("\n") else f"{line}\n" for line in left))
    if state == "interrupted":
        interrupt(run_dir)
    said = run(tmp_path)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert wanted in said.err


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("uplink_bytes", "many", "rounds.jsonl:1: uplink_bytes = 'many'; allowed: a number"),
        ("seconds", {}, "rounds.jsonl:1: missing seconds.total"),
        ("flops", 10**400, "rounds.jsonl:1: not valid JSON: 1000"),
    ],
)
def test_a_value_of_the_wrong_type_is_not_gone_on_with(
    key: str, value: object, wanted: str, tmp_path: Path
) -> None:
    assert run(tmp_path).code == 0
    run_dir = only_run(tmp_path)
    interrupt(run_dir)
    first, *others = (run_dir / "rounds.jsonl").read_text().splitlines(keepends=True)
    changed = json.dumps(json.loads(first) | {key: value}) + "\n"
    (run_dir / "rounds.jsonl").write_text("".join([changed, *others]))
    said = run(tmp_path)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert wanted in said.err


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "rounds.jsonl", "run.json"])
def test_a_folder_in_place_of_a_file_is_one_line(name: str, tmp_path: Path) -> None:
    assert run(tmp_path).code == 0
    run_dir = only_run(tmp_path)
    interrupt(run_dir)
    (run_dir / name).unlink()
    (run_dir / name).mkdir()
    said = run(tmp_path)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert f"{name}: Is a directory; allowed: " in said.err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"\\ud800"'])
@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_a_damaged_run_json_is_one_line(text: str, state: str, tmp_path: Path) -> None:
    assert run(tmp_path).code == 0
    run_dir = only_run(tmp_path)
    (run_dir / "run.json").write_text(text)
    if state == "interrupted":
        interrupt(run_dir)
    said = run(tmp_path)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "run.json: " in said.err
    assert (run_dir / "run.json").read_text() == text
