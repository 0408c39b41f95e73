"""IBQ: VQGAN's network with a codebook of which every row is trained (index backpropagation).

Paper 2412.02692, TencentARC/SEED-Voken (Apache-2.0); defaults are its 256-pixel configuration and module
names its published ones. The network is Chameleon's (taming-transformers), deeper and with attention at
16x16; what is new is the quantizer (`lexel.tokenizers.quantizers.ibq`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lexel.catalog import Published, System
from lexel.tokenizers.chameleon import ChameleonConfig, ChameleonTokenizer
from lexel.tokenizers.open_magvit2 import LAYOUT, check_pictures, flatten
from lexel.tokenizers.quantizers import QuantizerConfig

ENTROPY = 0.05  # `entropy_loss_weight` of the published loss; its `quant_loss_weight` is 1


@dataclass(frozen=True)
class IBQConfig(ChameleonConfig):
    """See `ChameleonConfig`; the defaults are those of the published 262,144 codes."""

    image_size: int = 256
    res_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    quantizer: QuantizerConfig = field(
        default_factory=lambda: QuantizerConfig("ibq", codebook_size=1 << 18, entropy=ENTROPY)
    )

    def build(self) -> IBQTokenizer:
        """The tokenizer with fresh weights."""
        return IBQTokenizer(self)


class IBQTokenizer(ChameleonTokenizer):
    """See the module docstring. ``encode: [b, 3, h*f, w*f] -> Codes [b, h*w, 1]``, row-major."""

    model_type: ClassVar[str] = "ibq"
    config_class: ClassVar[type] = IBQConfig


# Published checkpoints
ARGUMENTS: dict[str, Any] = {
    "double_z": False,
    "z_channels": 256,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": (1, 1, 2, 2, 4),
    "num_res_blocks": 4,
    "attn_resolutions": (16,),
    "dropout": 0.0,
    "n_embed": 1 << 18,
    "embed_dim": 256,
    "beta": 0.25,
    "use_entropy_loss": True,
    "entropy_temperature": 0.01,
    "sample_minimization_weight": 1.0,
    "batch_maximization_weight": 1.0,
    "use_ema": True,
}


def configure(arguments: Mapping[str, Any]) -> IBQConfig:
    """The reference's arguments → our config. `use_ema` is not looked at: the file shows whether it has an
    averaged copy."""
    check_pictures(arguments)
    return IBQConfig(
        image_size=arguments["resolution"],
        channels=arguments["ch"],
        channel_mult=tuple(arguments["ch_mult"]),
        res_blocks=arguments["num_res_blocks"],
        z_channels=arguments["z_channels"],
        embed_dim=arguments["embed_dim"],
        attn_resolutions=tuple(arguments["attn_resolutions"]),
        dropout=arguments["dropout"],
        quantizer=QuantizerConfig(
            "ibq",
            codebook_size=arguments["n_embed"],
            commitment=arguments["beta"],
            entropy=ENTROPY if arguments["use_entropy_loss"] else 0.0,
            entropy_certainty=arguments["sample_minimization_weight"],
            entropy_gamma=arguments["batch_maximization_weight"],
            temperature=arguments["entropy_temperature"],
        ),
    )


def _row(name: str, codes: int, repository: str, file: str, parameters: int, rfid: str) -> Published:
    return Published(
        name=name,
        repository=f"TencentARC/IBQ-Tokenizer-{repository}",
        file=file,
        arguments={"n_embed": codes},
        parameters=parameters,
        tokens="16x16",
        codebook=f"{codes} x 256",
        code_licence="Apache-2.0",
        weight_licence="not stated",
        source="arXiv 2412.02692, github.com/TencentARC/SEED-Voken",
        rfid=rfid,
    )


IBQ = System(
    name="ibq",
    arguments=ARGUMENTS,
    configure=configure,
    flatten=flatten,
    layouts=(LAYOUT,),
    nestings=("state_dict",),
    container="state_dict",
    dotless_ema=True,
    rows=(
        _row("ibq-1024", 1024, "1024", "imagenet256_1024.ckpt", 107_049_859, "2.24"),
        _row("ibq-8192", 8192, "8192", "imagenet256_8192.ckpt", 108_884_867, "1.87"),
        _row("ibq-16384", 16384, "16384", "imagenet256_16384.ckpt", 110_982_019, "1.37"),
        _row("ibq-262144", 262144, "262144", "imagenet256_262144.ckpt", 173_896_579, "1.00"),
        _row("ibq-pretrain-16384", 16384, "16384-Pretrain", "IBQ_pretrain_16384.ckpt", 110_982_019, "2.06"),
        _row(
            "ibq-pretrain-262144", 262144, "262144-Pretrain", "IBQ_pretrain_262144.ckpt", 173_896_579, "1.53"
        ),
    ),
)
SYSTEMS = (IBQ,)
