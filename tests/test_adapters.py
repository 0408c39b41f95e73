"""Training a part of a language model: LoRA with the rows of added ids, groups by name, what is exported."""

from functools import partial

import pytest
import torch
from decoding_fakes import RASTER, codec, model
from test_pretrained import backbone, ids_of
from test_pretrained import run as run_lm
from torch.optim import AdamW
from torch.utils.data import Dataset
from wrapped_fakes import wrapped

from lexel.document import Image, Text
from lexel.errors import LexelError
from lexel.models import load_lm
from lexel.models.causal_lm import CausalLM
from lexel.models.routed import route
from lexel.models.wrapped_lm import WrappedLM
from lexel.tokenizers.layout import CodeLayout
from lexel.train.adapters import added_ids, group_of, merged, prepare, tables, train_only
from lexel.train.batches import Batches
from lexel.train.fit import fit
from lexel.train.lm_module import LMModule
from lexel.train.objectives.lm import NextTokenObjective
from lexel.train.settings import AdapterSettings, LMStage, LoggerSettings, Run, Stages, TrainerSettings
from lexel.types import Codes

KIT = codec(RASTER)
ROUTED = ("lm.routed=true", "stages.lm.trainable=[picture,new_rows]")
SLIDE = ("stages.lm.adapter.kind=slide_lora", "stages.lm.adapter.r=2")
TEXT, ADDED = torch.arange(3), added_ids(KIT.vocabulary)
LORA = AdapterSettings("lora", r=2, alpha=4.0)
NETWORKS = {
    "tied": lambda: model(KIT, dtype=torch.float32),
    "untied": lambda: model(KIT, dtype=torch.float32, tie_embeddings=False, qk_norm=True),
    "gemma": lambda: model(KIT, dtype=torch.float32, sandwich_norm=True, embed_scale=4.0, logit_softcap=9.0),
    "GPT2": lambda: wrapped("GPT2", KIT),
    "GPTNeoX": lambda: wrapped("GPTNeoX", KIT, tie_word_embeddings=False),
    "Phi": lambda: wrapped("Phi", KIT),
}


def document(seed, kit=KIT):
    layout = kit.layouts["image"]
    codes = torch.randint(
        layout.codebook_sizes[0],
        (1, layout.positions, layout.k),
        generator=torch.Generator().manual_seed(seed),
    )
    return kit.build([Text("ab a"[: 1 + seed % 4]), Image(Codes(codes, layout.grid))])


def stage(**changes):
    options = {"ema": 0.0, "optimizer": partial(AdamW, weight_decay=0.3), "schedule": "constant", "warmup": 0}
    return LMStage(**{**options, "lr": 0.02, **changes})


def trained(network, settings, steps=3, kit=KIT):
    """The module after some steps."""
    torch.manual_seed(0)
    module = LMModule(
        network, NextTokenObjective(kit.vocabulary.modalities), settings, 0, None, kit.vocabulary
    )
    network.train()
    optimizer = module.optimizer_for(network.named_parameters(), settings.lr)["optimizer"]
    batch = kit.collate([document(seed, kit) for seed in range(8)])
    for _ in range(steps):
        loss, _ = module.compute(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    return module


def rows(network):
    return {name: table.weight.detach().clone() for name, table in tables(network).items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_lora_trains_the_added_rows_and_leaves_text_rows_bit_for_bit(name):
    network = NETWORKS[name]()
    before, whole = rows(network), {k: v.clone() for k, v in network.state_dict().items()}
    module = trained(network, stage(adapter=LORA))
    made = merged(module.exported)
    after = rows(made)
    assert before.keys() == after.keys()
    for table in before:
        assert torch.equal(after[table][TEXT], before[table][TEXT])
        moved = (after[table][ADDED] != before[table][ADDED]).any(1)
        # Every row of the output table has a gradient from the softmax, of an input table what was read.
        assert moved.all() if table == "head" or len(tied(made)) == 1 else moved.sum() > 6
    own = {id(part) for table in tables(made).values() for part in table.parameters()}
    for key, value in made.named_parameters():
        adapted = group_of(made, key) in ("attention", "ffn") and value.ndim == 2
        learned = adapted or id(value) in own or key.startswith("future.")
        assert torch.equal(value, whole[key]) != learned, key


def tied(network):
    return {id(table.weight) for table in tables(network).values()}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_exported_is_what_was_trained_in_plain_weights(name, tmp_path):
    network = NETWORKS[name]()
    shared = len(tied(network))
    module = trained(network, stage(adapter=LORA))
    made = merged(module.exported)
    assert type(made) is type(network)
    assert not any("lora" in key or "parametriz" in key for key in made.state_dict())
    assert len(tied(made)) == shared
    batch = KIT.collate([document(seed) for seed in range(4)])
    with torch.no_grad():
        wanted = network(batch).logits
        torch.testing.assert_close(made(batch).logits, wanted, atol=1e-4, rtol=1e-4)
        made.save_pretrained(tmp_path)
        again = type(made).from_pretrained(tmp_path)
        torch.testing.assert_close(again(batch).logits, wanted, atol=1e-4, rtol=1e-4)
    assert any("lora" in key for key in network.state_dict())  # training can go on


def test_the_published_recipe_of_liquid_would_not_train_its_codes():
    """LoRA on the projections, with neither table: rank 64, alpha 16 (Liquid's script)."""
    from peft import LoraConfig, inject_adapter_in_model

    network = NETWORKS["untied"]()
    before = rows(network)
    inject_adapter_in_model(
        LoraConfig(r=64, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), network
    )
    trained(network, stage())
    theirs = {table: (rows(network)[table][ADDED] != before[table][ADDED]).any() for table in before}
    assert not any(theirs.values())
    ours = NETWORKS["untied"]()
    module = trained(ours, stage(adapter=AdapterSettings("lora", r=64, alpha=16.0, targets=["q_proj"])))
    assert all((rows(merged(module.network))[table][ADDED] != before[table][ADDED]).any() for table in before)


def test_several_codes_per_position_train_their_head():
    kit = codec(CodeLayout((3, 4), grid=(2, 2)))
    network = model(kit, dtype=torch.float32)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    made = merged(trained(network, stage(adapter=LORA), kit=kit).exported)
    heads = [key for key in before if key.startswith("head.") and key.endswith("weight")]
    assert heads
    assert all(not torch.equal(before[key], made.state_dict()[key]) for key in heads)


@pytest.mark.parametrize(("targets", "count"), [([], 14), (["q_proj", "mlp.up_proj"], 4)])
def test_targets(targets, count):
    network = NETWORKS["tied"]()
    prepare(network, stage(adapter=AdapterSettings("lora", targets=targets)), KIT.vocabulary)
    assert sum("lora_A" in name for name, _ in network.named_parameters()) == count


def test_the_groups_of_a_model():
    network = NETWORKS["untied"]()
    names = {name: group_of(network, name) for name, _ in network.named_parameters()}
    layer = "model.layers.1."
    assert names["model.embed_tokens.weight"] == "embeddings"
    assert names["lm_head.weight"] == names["future.heads.0.weight"] == "head"
    assert names[layer + "self_attn.q_proj.weight"] == "attention"
    assert names[layer + "self_attn.q_norm.weight"] == names["model.norm.weight"] == "norms"
    assert names[layer + "mlp.gate_proj.weight"] == "ffn"
    assert group_of(routed := route(network), layer + "mlp.picture.up_proj.weight") == "picture"
    assert group_of(routed, layer + "mlp.text.up_proj.weight") == "ffn"


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_in_a_group(name):
    network = NETWORKS[name]()
    assert "other" not in {group_of(network, parameter) for parameter, _ in network.named_parameters()}


@pytest.mark.parametrize(
    "groups", [["norms"], ["attention", "head"], ["new_rows"], ["ffn", "new_rows"], ["embeddings"]]
)
@pytest.mark.parametrize("name", ["untied", "GPT2"])
def test_only_the_named_groups_learn(name, groups):
    if name == "GPT2" and "head" in groups:
        groups = ["attention"]  # tied: its output table is the embedding
    network = NETWORKS[name]()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    made = merged(trained(network, stage(trainable=groups)).exported)
    wanted = {g: g for g in groups}
    for key, _ in made.named_parameters():
        changed = not torch.equal(made.state_dict()[key], before[key])
        group = group_of(made, key)
        expected = group in wanted or (
            "new_rows" in groups and group in ("embeddings", "head") and "wpe" not in key
        )
        idle = key.startswith("future.")
        assert changed == expected or idle, key
    if groups == ["new_rows"]:
        for table, value in rows(made).items():
            old = rows(NETWORKS[name]())[table]
            assert torch.equal(value[TEXT], old[TEXT])
            assert (value[ADDED] != old[ADDED]).any()


def test_patterns_and_groups_together():
    network = NETWORKS["tied"]()
    train_only(network, ["norms", "model.layers.0.mlp.*"])
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {name for name in learning if "norm" not in name} == {
        f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    train_only(network, ["all"])
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_routed_model_learns_pictures_and_its_text_stays():
    network = route(NETWORKS["untied"]())
    text = KIT.collate([KIT.build([Text("ab a")])])
    before = network(text).logits[..., TEXT].detach()
    made = merged(trained(network, stage(trainable=["picture", "new_rows"])).exported)
    text_only = made(text)
    # <bos> is an added id, whose row learns: give it its old one back, and text is what it was.
    with torch.no_grad():
        old = route(NETWORKS["untied"]())
        made.model.embed_tokens.weight.copy_(old.model.embed_tokens.weight)
    assert torch.equal(made(text).logits[..., TEXT], before)
    assert not torch.equal(text_only.logits[..., ADDED], made(text).logits[..., ADDED])


class Documents(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, draw):
        return document(draw.index)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_training_is_the_same_training(tmp_path, ema):
    def run(folder, steps):
        torch.manual_seed(0)
        settings = stage(adapter=LORA, steps=steps, batch_size=4, ema=ema, checkpoint_every=2)
        settings.validate_every = settings.sample_every = 0
        network = NETWORKS["tied"]()
        objective = NextTokenObjective(KIT.vocabulary.modalities)
        module = LMModule(network, objective, settings, 0, None, KIT.vocabulary)
        batches = Batches(Documents(), None, KIT.collate, settings)
        fit("lm", module, batches, folder, TrainerSettings(), LoggerSettings())
        module.export(folder)
        return CausalLM.from_pretrained(folder).state_dict()

    straight = run(tmp_path / "straight", 4)
    run(tmp_path / "stopped", 2)
    resumed = run(tmp_path / "stopped", 4)
    start = NETWORKS["tied"]().state_dict()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert not torch.equal(
        straight["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"]
    )
    assert torch.equal(straight["model.embed_tokens.weight"][TEXT], start["model.embed_tokens.weight"][TEXT])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more"), [("gpt2", ()), ("qwen2", ROUTED), ("qwen2", SLIDE)])
def test_a_run_from_a_text_model_leaves_its_text_rows(tmp_path, kind, more):
    """`lexel-train lm=pretrained` from a folder of transformers to a model that is loaded as any other."""
    source = backbone(tmp_path / "text", kind)
    more = more or ("stages.lm.adapter.kind=lora", "lm.bidirectional=[image]")
    run_lm(
        source,
        tmp_path / "run",
        "task.stages=[lm]",
        "stages.lm.ema=0",
        "stages.lm.warmup=0",
        "stages.lm.lr=0.01",
        *more,
    )
    before, after = load_lm(source), load_lm(tmp_path / "run" / "lm")
    texts = ids_of(source)
    for name, table in tables(after).items():
        old = tables(before)[name].weight
        assert torch.equal(table.weight[:texts], old[:texts])
        spread = table.weight[texts:].std(0).amin()
        assert spread > 1e-3  # rows that began at one mean have gone apart
    assert bool(getattr(after.config, "routed", ())) == (more in (ROUTED, SLIDE))


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        LexelError, match=r"targets names \['c_attn'\]; the blocks' linear layers are down_proj"
    ):
        prepare(
            NETWORKS["tied"](), stage(adapter=AdapterSettings("lora", targets=["c_attn"])), KIT.vocabulary
        )
    with pytest.raises(
        LexelError, match="trainable names 'picture', of which CausalLM has nothing; it has attention"
    ):
        train_only(NETWORKS["tied"](), ["picture"])
    with pytest.raises(LexelError, match="needs the vocabulary"):
        train_only(NETWORKS["tied"](), ["new_rows"])
    larger = codec(CodeLayout((50,), grid=(2, 3)))
    with pytest.raises(LexelError, match="ids up to 58, the embeddings of the network 15 rows; extend"):
        train_only(NETWORKS["tied"](), ["new_rows"], larger.vocabulary)
    with pytest.raises(ValueError, match=r"stages.lm.adapter.kind is none, lora or slide_lora, got 'dora'"):
        stage(adapter=AdapterSettings("dora")).check("lm")
    with pytest.raises(ValueError, match=r"adapter needs r >= 1"):
        stage(adapter=AdapterSettings("lora", r=0)).check("lm")
    with pytest.raises(ValueError, match=r"stages.lm.narrow trains slices"):
        stage(adapter=LORA, narrow=0.5).check("lm")
    with pytest.raises(ValueError, match="fsdp2 does not shard"):
        Run(stages=Stages(lm=stage(adapter=LORA)), trainer=TrainerSettings(strategy="fsdp2")).check()


def test_plain_networks_are_exported_as_they_are():
    network = NETWORKS["GPT2"]()
    assert isinstance(network, WrappedLM)
    assert merged(network) is network
