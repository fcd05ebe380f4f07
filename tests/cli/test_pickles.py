"""No code of a file is run, whichever file of a checkpoint or of a model holds it."""

import json
import pickle
import shutil

import pytest
import torch
from test_cli import ASSETS, complaint, demo, invoke, train, write

from fastpref.trainer.manifest import read_manifest, write_manifest


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


class Malicious:
    """A pickle of it makes a file when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def zipped(file, mark):
    torch.save({"weight": Malicious(mark)}, file)


def legacy(file, mark):
    torch.save({"weight": Malicious(mark)}, file, _use_new_zipfile_serialization=False)


def bare(file, mark):
    file.write_bytes(pickle.dumps(Malicious(mark)))


FORMATS = [zipped, legacy, bare]
formats = pytest.mark.parametrize("save", FORMATS, ids=lambda f: f.__name__)


@pytest.fixture
def mark(tmp_path):
    """The file that malicious code makes."""
    return tmp_path / "it ran"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The output of a run of all weights and of one of an adapter, and their data."""
    path = tmp_path_factory.mktemp("runs")
    pairs = write(path / "pairs.jsonl", demo.read_pairs("train.jsonl")[:8])
    steps = "--max-steps", 1, "--save-steps", 1
    train(path / "whole", *steps, data=pairs)
    train(path / "adapter", *steps, "--lora", data=pairs)
    return path


def resume(runs, tmp_path, kind, prepare, code):
    """Continue a copy of a run whose checkpoint prepare(folder) has changed."""
    out = tmp_path / "out"
    shutil.copytree(runs / kind, out)
    checkpoint = out / "checkpoint-1"
    facts = read_manifest(checkpoint)["run"]
    prepare(checkpoint)
    write_manifest(checkpoint, 1, facts)  # with the sums of what is there now
    options = ["--lora"] if kind == "adapter" else []
    return train(
        out, "--max-steps", 2, "--resume", checkpoint, *options, data=runs / "pairs.jsonl",
        code=code,
    )  # fmt: skip


def test_the_pickles_of_these_tests_do_run(mark):
    pickle.loads(pickle.dumps(Malicious(mark))).close()
    assert mark.exists()


@formats
@pytest.mark.parametrize(
    "file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_file_of_a_checkpoint(runs, tmp_path, mark, file, save):
    result = resume(runs, tmp_path, "whole", lambda folder: save(folder / file, mark), code=2)
    assert not mark.exists(), "code of a checkpoint ran"
    assert file in complaint(result)


@pytest.mark.parametrize("file", ["training_args.bin", "scaler.pt"])
def test_a_file_that_is_not_read(runs, tmp_path, mark, file):
    resume(runs, tmp_path, "whole", lambda folder: zipped(folder / file, mark), code=0)
    assert not mark.exists(), "code of a checkpoint ran"


@formats
@pytest.mark.parametrize(
    "kind, old, new",
    [
        ("whole", "model.safetensors", "pytorch_model.bin"),
        ("adapter", "adapter_model.safetensors", "adapter_model.bin"),
    ],
)
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "instead"])
def test_weights_of_a_checkpoint(runs, tmp_path, mark, kind, old, new, beside, save):
    """The safetensors file is read, or else the other one is refused."""

    def prepare(folder):
        save(folder / new, mark)
        if not beside:
            (folder / old).unlink()

    result = resume(runs, tmp_path, kind, prepare, code=0 if beside else 2)
    assert not mark.exists(), "code of a checkpoint ran"
    if not beside:
        assert new in complaint(result)


def model_of(tmp_path, file, save, mark):
    folder = tmp_path / "model"
    shutil.copytree(ASSETS, folder)
    (folder / "model.safetensors").unlink()
    save(folder / file, mark)
    if file != "pytorch_model.bin":
        names = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": file}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(names))
    return folder


@formats
@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_weights_of_a_model(runs, tmp_path, mark, file, save):
    folder = model_of(tmp_path, file, save, mark)
    result = train(tmp_path / "out", data=runs / "pairs.jsonl", model=folder, code=2)
    assert not mark.exists(), "code of a model ran"
    assert file in complaint(result) and str(folder) in complaint(result)


@formats
def test_weights_of_an_adapter(runs, tmp_path, mark, save):
    folder = tmp_path / "adapter"
    shutil.copytree(runs / "adapter" / "checkpoint-1", folder)
    (folder / "adapter_model.safetensors").unlink()
    save(folder / "adapter_model.bin", mark)
    result = train(tmp_path / "out", data=runs / "pairs.jsonl", model=folder, code=2)
    assert not mark.exists(), "code of an adapter ran"
    assert "adapter_model.bin" in complaint(result)


@formats
def test_a_scaler_that_is_read(runs, tmp_path, mark, save, monkeypatch):
    """With fp16 on a GPU."""
    from accelerate import Accelerator

    class Scaler:
        def load_state_dict(self, state):
            raise AssertionError("the file was loaded")

    def resumed(folder):
        save(folder / "scaler.pt", mark)

    from fastpref.trainer.checkpointing import CheckpointingTrainer

    original = CheckpointingTrainer._load_scaler

    def load(self, checkpoint):
        monkeypatch.setattr(Accelerator, "scaler", Scaler(), raising=False)
        self.accelerator.scaler = Scaler()
        try:
            original(self, checkpoint)
        finally:
            self.accelerator.scaler = None

    monkeypatch.setattr(CheckpointingTrainer, "_load_scaler", load)
    result = resume(runs, tmp_path, "whole", resumed, code=2)
    assert not mark.exists(), "code of a checkpoint ran"
    assert "scaler.pt" in complaint(result)


def test_a_tokenizer_has_no_pickle(runs, tmp_path, mark):
    folder = tmp_path / "model"
    shutil.copytree(ASSETS, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        bare(folder / name, mark)
    result = invoke("train", "--model", folder, "--data", runs / "pairs.jsonl",
                    "--output", tmp_path / "out", code=2)  # fmt: skip
    assert not mark.exists() and complaint(result)
