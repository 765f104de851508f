"""Real pipelines of diffusers from small random components: nothing is downloaded, a run takes a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model, T5Config, T5EncoderModel

from helpers.cases import randomize

WIDTH = 32
TEXT = 16
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
ATTENTION_AND_FEED_FORWARD = {"attn": ("transformer_blocks.*.attn1",), "ffn": ("transformer_blocks.*.ff",)}
WITH_CROSS_ATTENTION = {**ATTENTION_AND_FEED_FORWARD, "cross_attn": ("transformer_blocks.*.attn2",)}


@dataclass(frozen=True)
class PipelineCase:
    """A pipeline, how to run it, and the submodules of its denoisers whose output is a branch before its gate.

    Attributes:
        make: the pipeline, with random weights.
        arguments: of a run; ``generator`` and ``num_inference_steps`` are added.
        branches: kind -> patterns (``*`` for one name), the same for all denoisers.
        denoisers: component names.
        second_begins: the step of six at which the second denoiser takes over.
    """

    make: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    branches: Mapping[str, tuple[str, ...]]
    denoisers: tuple[str, ...] = ("transformer",)
    second_begins: int = 0


def run(case: PipelineCase, pipe: Any, steps: int, seed: int = 1, **more: Any) -> Tensor:
    """The final latents, or what else the pipeline gives; equal seeds give equal runs."""
    torch.manual_seed(seed)  # noise of samplers that take no generator
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": steps, "generator": generator, **case.arguments(), **more}
    output = pipe(**arguments, return_dict=False)[0]
    return torch.as_tensor(output).clone()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_vae(channels: int = 4) -> nn.Module:
    return randomize(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=channels,
            norm_num_groups=4,
            sample_size=16,
            shift_factor=0.06,
            scaling_factor=1.5,
        ),
        7,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words to numbers, as a tokenizer of the ``tokenizers`` package made by hand."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(("<pad>", "<unk>", "</s>", "a", "red", "cat", "song"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=TEXT
    )


def tiny_t5(width: int = WIDTH) -> nn.Module:
    config = T5Config(vocab_size=16, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return randomize(T5EncoderModel(config), 8)


# Images.


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return quiet(diffusers.DiTPipeline(randomize(transformer, 1), image_vae(), scheduler, id2label={0: "a", 1: "b"}))


def pixart() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    parts = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_t5(), "vae": image_vae()}
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return quiet(diffusers.PixArtSigmaPipeline(transformer=randomize(transformer, 1), scheduler=scheduler, **parts))


def sd3_transformer() -> nn.Module:
    model = diffusers.SD3Transformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=16,
    )
    return randomize(model, 1)


NO_TEXT_SD3 = {
    name + suffix: None
    for name, suffixes in (("text_encoder", ("", "_2", "_3")), ("tokenizer", ("", "_2", "_3")))
    for suffix in suffixes
}


def sd3() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"transformer": sd3_transformer(), "scheduler": scheduler, "vae": image_vae()}
    return quiet(diffusers.StableDiffusion3Pipeline(**parts, **NO_TEXT_SD3))


def sd3_arguments() -> dict[str, Any]:
    return {
        "prompt_embeds": embeds(1, TEXT, WIDTH),
        "pooled_prompt_embeds": embeds(1, WIDTH),
        "negative_prompt_embeds": embeds(1, TEXT, WIDTH, seed=1),
        "negative_pooled_prompt_embeds": embeds(1, WIDTH, seed=1),
        "guidance_scale": 4.0,
        "height": 32,
        "width": 32,
        "output_type": "latent",
    }


def sd3_img2img() -> Any:
    return quiet(diffusers.StableDiffusion3Img2ImgPipeline(**sd3().components))


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        **HEADS,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        patch_size=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )
    text = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {"transformer": randomize(transformer, 1), "scheduler": scheduler, "vae": image_vae()}
    return quiet(diffusers.FluxPipeline(**parts, **text))


def flux_arguments() -> dict[str, Any]:
    return {
        "prompt_embeds": embeds(1, TEXT, WIDTH),
        "pooled_prompt_embeds": embeds(1, WIDTH),
        "negative_prompt_embeds": embeds(1, TEXT, WIDTH, seed=1),
        "negative_pooled_prompt_embeds": embeds(1, WIDTH, seed=1),
        "true_cfg_scale": 3.0,
        "height": 32,
        "width": 32,
        "output_type": "latent",
    }


# Video.


def cogvideox_transformer() -> nn.Module:
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT,
    )
    return randomize(model, 1)


def cogvideox_vae() -> nn.Module:
    return randomize(
        diffusers.AutoencoderKLCogVideoX(
            in_channels=3,
            out_channels=3,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        7,
    )


def cogvideox_parts() -> dict[str, Any]:
    return {"tokenizer": None, "text_encoder": None, "vae": cogvideox_vae(), "transformer": cogvideox_transformer()}


def cogvideox() -> Any:
    scheduler = diffusers.CogVideoXDPMScheduler()
    return quiet(diffusers.CogVideoXPipeline(scheduler=scheduler, **cogvideox_parts()))


def cogvideox_v2v() -> Any:
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return quiet(diffusers.CogVideoXVideoToVideoPipeline(scheduler=scheduler, **cogvideox_parts()))


def video_arguments(**more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": embeds(1, TEXT, WIDTH),
        "negative_prompt_embeds": embeds(1, TEXT, WIDTH, seed=1),
        "guidance_scale": 4.0,
        "height": 32,
        "width": 32,
        "output_type": "latent",
        **more,
    }


def wan_transformer(seed: int) -> nn.Module:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return randomize(model, seed)


def wan(second: bool = False) -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return quiet(
        diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=randomize(vae, 7),
            transformer=wan_transformer(1),
            transformer_2=wan_transformer(2) if second else None,
            scheduler=diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            boundary_ratio=0.7 if second else None,
        )
    )


def latte() -> Any:
    transformer = diffusers.LatteTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        norm_type="ada_norm_single",
        activation_fn="gelu-approximate",
        attention_bias=True,
        video_length=2,
        norm_elementwise_affine=False,
    )
    parts = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_t5(), "vae": image_vae()}
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return quiet(diffusers.LattePipeline(transformer=randomize(transformer, 1), scheduler=scheduler, **parts))


# Audio.


def stable_audio() -> Any:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=32,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=WIDTH,
        time_proj_dim=8,
        global_states_input_dim=2 * WIDTH,
        cross_attention_input_dim=WIDTH,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=6,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = diffusers.StableAudioProjectionModel(
        text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
    )
    return quiet(
        diffusers.StableAudioPipeline(
            vae=randomize(vae, 7),
            text_encoder=tiny_t5(),
            projection_model=randomize(projection, 9),
            tokenizer=tiny_tokenizer(),
            transformer=randomize(transformer, 1),
            scheduler=diffusers.CosineDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction"),
        )
    )


def ace_step() -> Any:
    common = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    transformer = diffusers.AceStepTransformer1DModel(
        **common,
        intermediate_size=64,
        num_hidden_layers=2,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        patch_size=2,
        sliding_window=16,
    )
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    conditions = AceStepConditionEncoder(
        **common,
        intermediate_size=64,
        text_hidden_dim=WIDTH,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        sliding_window=16,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=8,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    text = Qwen3Config(
        vocab_size=16,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return quiet(
        diffusers.AceStepPipeline(
            vae=randomize(vae, 7),
            text_encoder=randomize(Qwen3Model(text), 8),
            tokenizer=tiny_tokenizer(),
            transformer=randomize(transformer, 1),
            condition_encoder=randomize(conditions, 9),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        )
    )


SD3_BRANCHES = {
    "attn": ("transformer_blocks.*.attn",),
    "ffn": ("transformer_blocks.*.ff", "transformer_blocks.*.ff_context"),
}
WAN_BRANCHES = {"attn": ("blocks.*.attn1",), "cross_attn": ("blocks.*.attn2",), "ffn": ("blocks.*.ffn",)}

CASES: dict[str, PipelineCase] = {
    "dit_ddim": PipelineCase(
        dit, lambda: {"class_labels": [1, 2], "guidance_scale": 4.0, "output_type": "np"}, ATTENTION_AND_FEED_FORWARD
    ),
    "pixart_sigma": PipelineCase(
        pixart,
        lambda: {
            "prompt": "a red cat",
            "height": 16,
            "width": 16,
            "use_resolution_binning": False,
            "max_sequence_length": TEXT,
            "output_type": "latent",
        },
        WITH_CROSS_ATTENTION,
    ),
    "sd3": PipelineCase(sd3, sd3_arguments, SD3_BRANCHES),
    "flux_true_cfg": PipelineCase(
        flux, flux_arguments, {**SD3_BRANCHES, "attn_ffn": ("single_transformer_blocks.*.proj_out",)}
    ),
    "cogvideox": PipelineCase(
        cogvideox,
        lambda: video_arguments(num_frames=5),
        {"attn": ("transformer_blocks.*.attn1",), "ffn": ("transformer_blocks.*.ff",)},
    ),
    "wan": PipelineCase(wan, lambda: video_arguments(num_frames=5), WAN_BRANCHES),
    "wan_2_2": PipelineCase(
        lambda: wan(second=True),
        lambda: video_arguments(num_frames=5),
        WAN_BRANCHES,
        ("transformer", "transformer_2"),
        second_begins=2,
    ),
    "latte": PipelineCase(
        latte,
        lambda: {
            "prompt": "a red cat",
            "negative_prompt": "song",
            "height": 16,
            "width": 16,
            "video_length": 2,
            "clean_caption": False,
            "output_type": "latent",
        },
        {
            "attn": ("transformer_blocks.*.attn1", "temporal_transformer_blocks.*.attn1"),
            "cross_attn": ("transformer_blocks.*.attn2",),
            "ffn": ("transformer_blocks.*.ff", "temporal_transformer_blocks.*.ff"),
        },
    ),
    "stable_audio": PipelineCase(
        stable_audio,
        lambda: {
            "prompt": "a red song",
            "negative_prompt": "cat",
            "audio_end_in_s": 8.0,
            "output_type": "latent",
        },
        WITH_CROSS_ATTENTION,
    ),
    "ace_step": PipelineCase(
        ace_step,
        lambda: {"prompt": "a red song", "lyrics": "cat", "audio_duration": 8.0, "output_type": "latent"},
        {"attn": ("layers.*.self_attn",), "cross_attn": ("layers.*.cross_attn",), "ffn": ("layers.*.mlp",)},
    ),
}
