"""Latent diffusion models, built step by step: a first stage, diffusion in its latents, conditions, samplers.

    import ldm_edu as ldm
    model = ldm.load("scenes-text")
    images = model.sample(["a red circle left of a blue square"], seed=0)
"""
__version__ = "0.1.0"

import importlib

_WHERE = {
    "load": "ldm", "load_first_stage": "ldm", "save": "ldm", "pretrained_names": "ldm", "LatentDiffusion": "ldm", "LDMConfig": "ldm",
    "Scenes": "data", "make_prompts": "data", "ImageFolder": "folders", "from_torchvision": "folders",
    "TarImages": "tar_images", "pack_images": "tar_images",
    "AutoencoderVQ": "quantize", "IdentityStage": "quantize", "make_first_stage": "quantize",
    "AutoencoderKL": "autoencoder", "AutoencoderConfig": "autoencoder", "UNet": "unet", "UNetConfig": "unet",
    "Conditioner": "conditioning", "Condition": "conditioning", "TextConditioner": "conditioning", "ClassConditioner": "conditioning",
    "LayoutConditioner": "layout", "SemanticConditioner": "layout", "JointConditioner": "layout",
    "LowResConditioner": "superres", "low_res_pairs": "superres", "InpaintConditioner": "inpainting", "with_masks": "inpainting", "outpaint": "inpainting",
    "WindowedModel": "windows", "FrozenTextConditioner": "frozen_text", "FrozenTextConfig": "frozen_text",
    "for_sampling": "scaling", "make_schedule": "schedule", "grade": "grader", "train_autoencoder": "recipes", "train_diffusion": "recipes",
    "classifier_guided": "editing", "image_guided": "editing", "sdedit": "editing", "repaint": "editing", "inpaint": "editing",
    "edit_by_inversion": "editing", "slerp": "editing", "blend_conditions": "editing", "prompt_denoiser": "editing",
    "load_compvis": "weights", "save_compvis": "weights", "load_diffusers": "weights", "save_diffusers": "weights",
    "convert_model": "convert", "inspect_model": "inspection",
    "examine": "doctor", "examine_run": "checkup",
    "profile": "core", "use_profile": "core",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str):
    """Import a public name's module when the name is first used, so that `import ldm_edu` stays light."""
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__():
    return sorted([*globals(), *_WHERE])
