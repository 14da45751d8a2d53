"""Tiny random models of diffusers and transformers: PixArt, Latte, T5 with its tokenizer, an autoencoder."""

import diffusers
import torch

COMMON = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 48,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 10,
}
LAYOUT = {"num_pooling_blocks": 1, "num_sdtm": 1, "sdtm_blocks": (1, 1, 1, 1)}  # of six blocks one is left
_WORDS = ["a", "the", "red", "green", "blue", "cat", "dog", "house", "on"]
PROMPTS = ["A red cat on the house ", "the blue dog"]


def randomise(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for one in model.parameters():
            one.normal_(std=0.7 * one[0].numel() ** -0.5 if one.dim() > 1 else 0.1)
    return model.eval()


def pixart(**options):
    return randomise(diffusers.PixArtTransformer2DModel(num_layers=6, **COMMON | options))


def latte(**options):
    return randomise(diffusers.LatteTransformer3DModel(num_layers=3, video_length=4, **COMMON | options))


def tokenizer():
    """T5's, with a few words, letters, and nothing from the network."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -2.0) for word in _WORDS]
    return T5Tokenizer(vocab=pieces + [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz"], extra_ids=0)


def text_encoder(width=10):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer()), d_model=width, **sizes)).eval()


def autoencoder(levels=1, seed=0):
    """Latents of four channels; each level but the first halves the sides."""
    torch.manual_seed(seed)
    sizes = {"norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4, "mid_block_add_attention": False}
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return diffusers.AutoencoderKL(block_out_channels=(8,) * levels, **kinds, **sizes).eval()


def save_text_encoder(folder, **options):
    """A folder as --text-encoder takes it, both parts in one."""
    tokenizer().save_pretrained(folder)
    text_encoder(**options).save_pretrained(folder)
    return folder
