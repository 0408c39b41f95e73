"""Frozen parts of a detokenizer: a VAE whose latents it draws, a text encoder that it reads.

Both are described in the detokenizer's own config by the settings of diffusers' or transformers' config file
and saved with its weights, so that a detokenizer loads alone. They never train.

b batch · c latent channels · h w latent grid · l text positions · e text width · H W picture
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lexel.errors import LexelError
from lexel.hub import read_config, resolve_folder

# diffusers' picture VAEs by class: module, and the setting with one entry per resolution.
VAES = {
    "AutoencoderKL": ("autoencoder_kl", "block_out_channels"),
    "AutoencoderTiny": ("autoencoder_tiny", "encoder_block_out_channels"),
    "AutoencoderDC": ("autoencoder_dc", "encoder_block_out_channels"),
    "AsymmetricAutoencoderKL": ("autoencoder_asym_kl", "down_block_out_channels"),
}
TEXT_FOLDER = "text_tokenizer"


# VAE


def vae_settings(name: str | Path) -> dict[str, Any]:
    """The settings of the VAE in a folder or under a hub id. Raises LexelError when it is none of `VAES`."""
    folder = resolve_folder(name, "VAE")
    settings = read_config(folder)
    known = inspect.signature(_vae_class(settings).__init__).parameters  # files hold derived values, too
    return {key: value for key, value in settings.items() if key == "_class_name" or key in known}


def vae_geometry(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(f, c) of a VAE: pixels per latent cell side and latent channels."""
    levels = len(_setting(settings, VAES[_vae_class(settings).__name__][1]))
    return 2 ** (levels - 1), int(_setting(settings, "latent_channels"))


class FrozenVAE(nn.Module):
    """Pictures to scaled latents ``[b, c, h, w]`` and back, in float32 whatever autocast says."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        values = {key: value for key, value in settings.items() if key != "_class_name"}
        self.net = _vae_class(settings)(**values).eval().requires_grad_(False)
        self.scale = _setting(settings, "scaling_factor") or 1.0
        self.shift = _setting(settings, "shift_factor") or 0.0

    def load(self, name: str | Path) -> None:
        """Take the weights of a folder or hub id of the same architecture. Raises LexelError."""
        self.net.load_state_dict(_opened(type(self.net), name, "VAE").state_dict())

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures ``[b, 3, H, W]`` in [-1, 1] → latents, the posterior's mean where there is one."""
        with torch.autocast(pixels.device.type, enabled=False):
            found = self.net.encode(pixels.float())
        if hasattr(found, "latent_dist"):
            latents = found.latent_dist.mode()
        else:
            latents = found.latents if hasattr(found, "latents") else found.latent
        return (latents - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents → pictures."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.net.decode(latents.float() / self.scale + self.shift).sample


def _vae_class(settings: Mapping[str, Any]) -> Any:
    name = settings.get("_class_name")
    if name not in VAES:
        raise LexelError(f"a detokenizer draws in the latents of {', '.join(VAES)}, not of {name!r}.")
    return getattr(import_module(f"diffusers.models.autoencoders.{VAES[name][0]}"), name)


def _setting(settings: Mapping[str, Any], name: str) -> Any:
    """A setting, or what its class defaults to (None where it has no such setting)."""
    known = inspect.signature(_vae_class(settings).__init__).parameters
    return settings.get(name, known[name].default if name in known else None)


# Text


def text_settings(name: str | Path) -> dict[str, Any]:
    """The settings of the text encoder in a folder or under a hub id: any encoder that transformers' text
    encoding class knows, or the text half of a CLIP-like model. Raises LexelError when it is none."""
    from transformers import AutoConfig

    folder = resolve_folder(name, "text encoder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise LexelError(f"{folder} holds no text encoder that transformers knows ({error}).") from error
    half = getattr(config, "text_config", config)
    found: dict[str, Any] = half.to_diff_dict() | {"model_type": half.model_type}
    return {key: value for key, value in found.items() if key != "transformers_version"}


class FrozenText(nn.Module):
    """Captions → the encoder's last states ``[b, l, e]``, l fixed, and which of them are words."""

    def __init__(self, settings: Mapping[str, Any], length: int) -> None:
        super().__init__()
        self.net = _text_network(settings).eval().requires_grad_(False)
        self.length = length
        self.tokenizer: Any = None

    @property
    def width(self) -> int:
        """e"""
        return int(self.net.config.hidden_size)

    def load(self, name: str | Path) -> None:
        """Take weights and words of a folder or hub id of the same architecture. Raises LexelError."""
        self.net.load_state_dict(_opened(type(self.net), name, "text encoder").state_dict())
        self.load_tokenizer(resolve_folder(name, "text encoder"))

    def load_tokenizer(self, folder: Path) -> None:
        """Take the text tokenizer of a folder. Raises LexelError when there is none."""
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # tokenizers raises a bare Exception for damaged files
            raise LexelError(f"{folder} holds no readable text tokenizer ({error}).") from error
        if self.tokenizer.pad_token is None:  # any will do: padding is masked
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)

    @torch.no_grad()
    def forward(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """States ``[b, l, e]`` and bool ``[b, l]``; of a caption None no position is a word. Raises
        LexelError without a text tokenizer."""
        if self.tokenizer is None:
            raise LexelError("this detokenizer's text tokenizer is missing; load it with from_pretrained.")
        device = next(self.net.parameters()).device
        read = self.tokenizer(
            [caption or "" for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).to(device)
        given = torch.tensor([caption is not None for caption in captions], device=device)
        with torch.autocast(device.type, enabled=False):
            states = self.net(input_ids=read.input_ids, attention_mask=read.attention_mask).last_hidden_state
        return states, read.attention_mask.bool() & given[:, None]


def _text_network(settings: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

    config = AutoConfig.for_model(**settings)
    known = type(config) in AutoModelForTextEncoding._model_mapping
    return (AutoModelForTextEncoding if known else AutoModel).from_config(config)


def _opened(cls: Any, name: str | Path, what: str) -> Any:
    try:
        model, facts = cls.from_pretrained(resolve_folder(name, what), output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise LexelError(f"{name} is not a readable {what} ({error}).") from error
    if facts["missing_keys"]:  # such tensors would be random
        raise LexelError(
            f"{name} is no whole {what}: it lacks {', '.join(sorted(facts['missing_keys'])[:5])}."
        )
    return model
