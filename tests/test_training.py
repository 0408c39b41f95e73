"""The training machinery: steps are steps, averages average, checkpoints survive, stages are reused or
not."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_fakes import Toy, ToyConfig, ToyData, ToyModule, toy_stage, toy_training

from lexel.errors import LexelError
from lexel.train.batches import Batches, FixedBatches
from lexel.train.callbacks.checkpoint import AtomicCheckpoint, last_checkpoint
from lexel.train.callbacks.checkpoint import replace as replace_path
from lexel.train.callbacks.codebook import codebook_statistics
from lexel.train.callbacks.ema import update_average
from lexel.train.callbacks.metrics_file import MetricsFile
from lexel.train.callbacks.pictures import grid
from lexel.train.chain import Chain, Remembering
from lexel.train.fit import fit
from lexel.train.record import StageRecord, differences, plain
from lexel.train.settings import LoggerSettings, Run, TrainerSettings, weight_settings

CPU, CSV = TrainerSettings(), LoggerSettings()


def _train(folder: Path, **changes: Any) -> ToyModule:
    module, batches = toy_training(**changes)
    fit("toy", module, batches, folder, CPU, CSV)
    return module


# One run


def test_a_run_takes_exactly_its_steps_and_leaves_its_files(tmp_path: Path) -> None:
    module = _train(tmp_path)
    assert (module.step, module.consumed) == (12, 24)
    assert float(module.network.seen) == 24
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-000007.png"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    rows = MetricsFile(tmp_path / "metrics.csv").rows()
    assert [row["step"] for row in rows if row["loss"]] == ["2", "4", "6", "8", "10", "12"]
    assert [row["step"] for row in rows if row["validation/loss"]] == ["3", "6", "9", "12"]


def test_accumulation_over_two_batches_is_one_batch_of_twice_the_size(tmp_path: Path) -> None:
    weights = []
    for name, size, accumulate in (("one", 8, 1), ("two", 4, 2)):
        stage = toy_stage(batch_size=size, accumulate=accumulate, ema=0.0, validate_every=0, steps=5)
        torch.manual_seed(0)
        module = ToyModule(Toy(ToyConfig()), stage, seed=5)
        module.network.drop.p = module.network.momentum = 0.0
        fit("toy", module, Batches(ToyData(), None, torch.stack, stage, seed=5), tmp_path / name, CPU, CSV)
        weights.append([p.detach() for p in module.network.parameters()])
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_without_averaging_the_live_network_is_exported(tmp_path: Path) -> None:
    module = _train(tmp_path, ema=0.0)
    assert module.average is None
    assert module.exported is module.network
    module = _train(tmp_path / "averaged")
    assert module.exported is module.average
    assert not torch.equal(module.average.blocks[0].weight, module.network.blocks[0].weight)


def test_vectors_are_not_decayed_and_the_schedule_ends_at_zero(tmp_path: Path) -> None:
    module = _train(tmp_path)
    groups = module.trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim == 1 for p in groups[1]["params"])
    assert groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_overfitting_one_batch_drives_the_loss_down(tmp_path: Path) -> None:
    stage = toy_stage(
        steps=400, accumulate=1, lr=1e-2, ema=0.0, validate_every=0, sample_every=0, schedule="constant"
    )
    torch.manual_seed(0)
    module = ToyModule(Toy(ToyConfig()), stage)
    module.network.drop.p = 0.0
    fit("toy", module, Batches(ToyData(4), None, torch.stack, stage), tmp_path, CPU, CSV)
    rows = MetricsFile(tmp_path / "metrics.csv").rows()
    assert float(rows[-1]["loss"]) < 0.05 * float(rows[0]["loss"])


# Averages


def test_an_average_is_the_closed_form_sum() -> None:
    network, decay = Toy(ToyConfig()), 0.9
    average = Toy(ToyConfig())
    expected = average.blocks[0].weight.detach().clone()
    for _ in range(5):
        nn.init.normal_(network.blocks[0].weight)
        expected = decay * expected + (1 - decay) * network.blocks[0].weight.detach()
        update_average(average, network, decay)
    torch.testing.assert_close(average.blocks[0].weight, expected)


def test_floating_buffers_are_averaged_and_others_copied() -> None:
    network, average = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    network.running_mean += 1
    network.num_batches_tracked += 7
    update_average(average, network, 0.75)
    torch.testing.assert_close(average.running_mean, torch.full((3,), 0.25))
    assert int(average.num_batches_tracked) == 7


# Checkpoints


class _Strategy:
    def barrier(self) -> None:
        pass


class _Saver:
    """Stands in for a trainer: writes bytes, or fails in the middle."""

    is_global_zero = True
    strategy = _Strategy()

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def save_checkpoint(self, path: Path) -> None:
        path.write_bytes(b"new")
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file: No space left"),
    ],
    ids=["system", "torch"],
)
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, error: Exception) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"old")
    with pytest.raises(LexelError, match=r"No space left.*previous one is kept"):
        AtomicCheckpoint(tmp_path, 1).save(_Saver(error))  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").read_bytes() == b"old"


def test_a_checkpoint_replaces_the_previous_one(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"old")
    AtomicCheckpoint(tmp_path, 1).save(_Saver())  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").read_bytes() == b"new"


def test_a_folder_checkpoint_is_replaced_and_a_cut_replacement_is_finished(tmp_path: Path) -> None:
    for name in ("last.ckpt", "next"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text(name)
    replace_path(tmp_path / "next", tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt" / "part").read_text() == "next"
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.old")  # killed between the two renames
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert (found / "part").read_text() == "next"


# Reports


def test_resuming_drops_the_rows_after_the_checkpoint_and_a_cut_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    for step in (1, 2, 3):
        file.log_metrics({"loss": step / 2, **({"late": 1.0} if step > 1 else {})}, step)
    with file.path.open("a") as stream:
        stream.write("4,0.")
    again = MetricsFile(file.path)
    again.rewind(2)
    again.log_metrics({"loss": 9.0}, 3)
    assert [(row["step"], row["loss"], row["late"]) for row in again.rows()] == [
        ("1", "0.5", ""),
        ("2", "1.0", "1.0"),
        ("3", "9.0", ""),
    ]


def test_codebook_statistics_of_known_counts() -> None:
    assert codebook_statistics(torch.full((8,), 3.0)) == (1.0, pytest.approx(8.0))
    usage, perplexity = codebook_statistics(torch.tensor([5.0, 0.0, 0.0, 0.0]))
    assert (usage, perplexity) == (0.25, pytest.approx(1.0))


def test_a_grid_puts_rows_and_columns_where_they_belong() -> None:
    pictures = torch.linspace(-1, 1, 6).view(2, 3, 1, 1, 1).expand(2, 3, 3, 4, 4)
    image = grid(pictures, gap=2)
    assert image.size == (3 * 4 + 2 * 2, 2 * 4 + 2)
    read = [[image.getpixel((c * 6 + 1, r * 6 + 1))[0] for c in range(3)] for r in range(2)]  # type: ignore[index]
    assert read == [[0, 51, 102], [153, 204, 255]]
    assert image.getpixel((4, 1)) == (255, 255, 255)


def test_validation_batches_are_dealt_out_without_overlap() -> None:
    dealt = [FixedBatches(100, 5, 3, rank, 2) for rank in range(2)]
    indices = [draw.index for batches in dealt for batch in batches for draw in batch]
    assert sorted(indices) == list(range(30))
    assert len(FixedBatches(3, 5, 4, 1, 2)) == 4


# Which stages run


def _record(folder: Path, **settings: Any) -> StageRecord:
    return StageRecord("toy", folder / "toy", settings)


def test_a_finished_stage_is_reused_only_with_equal_settings(tmp_path: Path) -> None:
    record = _record(tmp_path, lr=0.1, data={"size": 32})
    assert record.begin() is None
    assert (record.finished(), record.resumable()) == (None, True)
    record.finish(seconds=3.0)
    assert record.finished()["seconds"] == 3.0  # type: ignore[index]
    (record.folder / "weights").write_text("old")
    changed = _record(tmp_path, lr=0.1, data={"size": 64})
    assert changed.finished() is None
    assert changed.begin() == "data.size: 32 → 64"
    assert not (changed.folder / "weights").exists()
    assert (tmp_path / "toy.previous" / "weights").read_text() == "old"


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    record = _record(tmp_path)
    record.begin()
    (record.folder / "done.json").write_text("{")
    with pytest.raises(LexelError, match=r"done\.json is not valid JSON"):
        record.finished()


def test_settings_that_cannot_change_the_weights_do_not_retrain() -> None:
    one = toy_stage()
    assert weight_settings(one) == weight_settings(
        replace(one, validate_every=1, checkpoint_every=1, workers=2)
    )
    assert weight_settings(one) != weight_settings(replace(one, lr=0.5))


def test_records_are_plain_and_name_functions() -> None:
    record = plain(toy_stage())
    assert json.loads(json.dumps(record)) == record
    other = plain(toy_stage(optimizer=partial(torch.optim.SGD, momentum=0.5)))
    changed = differences(record, other)
    assert any("optimizer.call" in line and "SGD" in line for line in changed)
    assert any("optimizer.momentum" in line for line in changed)


def test_a_chain_stage_runs_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[Path] = []

    def work(folder: Path) -> dict[str, float]:
        calls.append(folder)
        return {"seconds": 1.0}

    chain = Chain(Run(output=str(tmp_path)))
    for settings in ({"a": 1}, {"a": 1}, {"a": 2}):
        chain.stage("toy", settings, work)
    assert len(calls) == 2
    output = capsys.readouterr().out
    assert "finished before, reused" in output
    assert "starting over, because a: 1 → 2" in output


def test_missing_parts_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(LexelError, match=r"no trained tokenizer in .*task=tokenizer.*parts\.tokenizer"):
        Chain(Run(output=str(tmp_path))).part_folder("tokenizer")


def test_remembered_examples_are_made_once_within_the_budget() -> None:
    from lexel.data.example import Example

    class Source(torch.utils.data.Dataset[Example]):
        made = 0

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Example:
            self.made += 1
            return Example(str(index), (), torch.zeros(3, 2, 2))

    source = Source()
    remembered = Remembering(source, limit=2 * 3 * 2 * 2 * 4)
    for _ in range(3):
        assert [remembered[i].key for i in range(4)] == ["0", "1", "2", "3"]
    assert source.made == 2 + 3 * 2


def test_remembered_examples_stay_behind_when_a_loading_process_starts() -> None:
    from torch.utils.data import TensorDataset

    remembered = Remembering(TensorDataset(torch.zeros(4, 1)), limit=100)
    vars(remembered)["_kept"][0] = "a picture"
    sent = copy.copy(remembered)  # by way of __getstate__, as to a process
    assert vars(sent)["_kept"] == {}
    assert len(sent) == 4


# The tokenizer's two optimizers


def _gan_module(**objective: Any) -> tuple[Any, Batches]:
    from lexel.models.discriminator import PatchDiscriminatorConfig
    from lexel.tokenizers.quantizers import QuantizerConfig
    from lexel.tokenizers.vq import VQTokenizerConfig
    from lexel.train.objectives.tokenizer import TokenizerObjectiveConfig
    from lexel.train.settings import TokenizerStage
    from lexel.train.tokenizer_module import TokenizerModule

    stage = TokenizerStage(**{**vars(toy_stage(steps=6)), "discriminator_lr": 1e-3})
    config = VQTokenizerConfig(
        image_size=16, channels=8, channel_mult=(1,), res_blocks=1, z_channels=8, attention=False, stem=4,
        norm_groups=4, encoder="patch", encoder_channels=8, quantizer=QuantizerConfig(codebook_size=8),
    )  # fmt: skip
    settings = {"adversarial_start": 3, "discriminator": PatchDiscriminatorConfig(8, 2), **objective}
    torch.manual_seed(0)
    module = TokenizerModule(config.build(), TokenizerObjectiveConfig(**settings).build(), stage)

    class Pictures(ToyData):
        def __init__(self) -> None:
            super().__init__(dim=3 * 16 * 16)
            self.rows = self.rows.view(-1, 3, 16, 16).tanh()

    return module, Batches(Pictures(), Pictures(), torch.stack, stage)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_discriminator_learns_from_its_start_step_on(tmp_path: Path, adaptive: bool) -> None:
    module, batches = _gan_module(adversarial=0.5, adaptive=adaptive)
    assert not module.automatic_optimization
    before = [p.detach().clone() for p in module.objective.discriminator.parameters()]
    at_start: list[Tensor] = []

    class Watch(AtomicCheckpoint):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if pl_module.consumed == 6:  # step 3 is next
                at_start.extend(p.detach().clone() for p in pl_module.objective.discriminator.parameters())

    fit("gan", module, batches, tmp_path, CPU, CSV, [Watch(tmp_path, 0)])
    assert module.step == 6
    assert all(torch.equal(a, b) for a, b in zip(before, at_start, strict=True))
    after = list(module.objective.discriminator.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_by_hand_and_automatic_optimisation_agree(tmp_path: Path) -> None:
    # A discriminator that never starts changes nothing: two code paths, one result.
    weights = []
    for name, adversarial in (("automatic", 0.0), ("manual", 0.5)):
        module, batches = _gan_module(adversarial=adversarial, adversarial_start=1000)
        fit(name, module, batches, tmp_path / name, CPU, CSV)
        weights.append(list(module.network.parameters()))
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


# The language model's modules


def test_distillation_is_zero_against_oneself_and_positive_otherwise() -> None:
    from lexel.train.lm_module import kl_divergence

    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert float(kl_divergence(logits, logits)) == pytest.approx(0, abs=1e-7)
    p, q = logits.softmax(-1), logits.flip(-1).softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(kl_divergence(logits, logits.flip(-1)), expected)


def test_narrow_steps_come_with_their_probability() -> None:
    from lexel.models.causal_lm import CausalLMConfig
    from lexel.train.lm_module import LMModule
    from lexel.train.objectives.lm import NextTokenObjective
    from lexel.train.settings import LMStage

    network = CausalLMConfig(vocab_size=8, dim=8, layers=1, heads=1, ffn_widths=(0.25, 0.5, 1.0)).build()
    module = LMModule(network, NextTokenObjective(), LMStage(narrow=0.3, ema=0.0, accumulate=2))
    drawn = []
    for batch in range(4000):
        module.consumed = batch
        drawn.append(module.width())
    assert drawn[0::2] == drawn[1::2]  # micro-batches of a step agree
    share = sum(width is not None for width in drawn[::2]) / 2000
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5  # 1 in 15000 by chance, and the seed is fixed
    assert {0.25, 0.5} == {width for width in drawn if width is not None}


# The command


def _command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lexel.train.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data=folder", "data.root=nowhere", "task=tokenizer"], "does not exist"),
        (["task=lm"], "no trained tokenizer"),
        (["stages.tokenizer.steps=-1"], "stages.tokenizer.steps must be at least 1"),
        (["stages.tokenizer.schedule=sinus", "debug=fast", "task=tokenizer"], "sinus"),
        (["parts.tokenizer=nowhere", "task=lm"], "nowhere does not exist"),
        (["sed=1"], "sed"),
    ],
)
def test_a_users_mistake_is_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    result = _command(*arguments, folder=tmp_path)
    assert result.returncode != 0
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_help_names_the_groups_and_an_example(tmp_path: Path) -> None:
    result = _command("--help", folder=tmp_path)
    assert result.returncode == 0
    assert "lexel-train experiment=quickstart" in result.stdout
    for group in (
        "task",
        "data",
        "tokenizer",
        "quantizer",
        "lm",
        "detokenizer",
        "objective/tokenizer",
        "trainer",
    ):
        assert f"\n{group}: " in result.stdout


def test_the_command_does_not_import_torch_to_print_its_help() -> None:
    code = "import sys, lexel.train.cli; assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_the_whole_chain_runs_and_is_reused(tmp_path: Path) -> None:
    arguments = ["experiment=quickstart", "debug=fast", "task=chain_with_drafter", "output=out"]
    first = _command(*arguments, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    output = tmp_path / "out"
    for name in ("tokenizer", "lm", "detokenizer", "drafter"):
        assert (output / name / "done.json").is_file()
        assert (output / name / "model.safetensors").is_file()
    for name in ("report.json", "index.html", "samples.png", "bundle/bundle.json", "bundle/README.md"):
        assert (output / name).is_file()
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*.safetensors")}
    second = _command(*arguments, folder=tmp_path)
    assert second.stdout.count("finished before, reused") == 6
    assert before == {p: p.stat().st_mtime_ns for p in output.rglob("*.safetensors")}
    third = _command(*arguments, "stages.drafter.lr=5e-4", folder=tmp_path)
    assert "drafter: starting over, because stage.lr: 0.001 → 0.0005" in third.stdout
    assert "lm: finished before" in third.stdout
    arguments = ["experiment=quickstart", "debug=fast", "task=lm", "output=given", "codes.folder=out/codes"]
    given = _command(*arguments, "parts.tokenizer=out/tokenizer", folder=tmp_path)
    assert given.returncode == 0, given.stderr
    assert not (tmp_path / "given" / "codes").exists()
    weights = [(tmp_path / name / "lm" / "model.safetensors").read_bytes() for name in ("out", "given")]
    assert weights[0] == weights[1]
    short = ["experiment=quickstart", "debug=fast", "task=drafter", "output=out", "drafter.max_length=40"]
    refused = _command(*short, folder=tmp_path)
    assert refused.returncode == 2
    assert "set drafter.max_length=" in refused.stderr


@pytest.mark.slow
def test_text_alone_trains_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was a bright cold day in April.\n" * 60)
    result = _command("task=lm", "data=text", "data.root=book.txt", "data.max_tokens=64", "debug=fast",
                      "output=out", folder=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "lm" / "model.safetensors").is_file()
    refused = _command("task=tokenizer", "data=text", "data.root=book.txt", folder=tmp_path)
    assert refused.returncode == 2


@pytest.mark.slow
def test_a_multirun_gives_each_job_its_folder(tmp_path: Path) -> None:
    arguments = ["--multirun", "task=tokenizer", "debug=fast", "quantizer=vq,fsq", "output=out"]
    result = _command(*arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    configs = [json.loads((tmp_path / "out" / job / "tokenizer" / "config.json").read_text()) for job in "01"]
    assert [config["quantizer"]["kind"] for config in configs] == ["vq", "fsq"]


@pytest.mark.slow
def test_offline_wandb_needs_no_account(tmp_path: Path) -> None:
    result = _command("task=tokenizer", "debug=fast", "logger=wandb", "output=out", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "out" / "tokenizer").rglob("*.wandb"))
    assert (tmp_path / "out" / "tokenizer" / "metrics.csv").is_file()
