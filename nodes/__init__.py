"""The ComfyUI nodes: thin adapters around `guidance`, one file per family."""

from __future__ import annotations


def node_classes() -> list[type]:
    """Every node of the pack, in the order in which the editor's menu should list them."""
    from .adapting import AdaptGenerator, GeneratorAdaptOptions
    from .baking import BakeDomainLoRA, BakeDomainOptions
    from .generators import BlendGenerators, GeneratorSample, LoadGenerator, SaveGenerator
    from .guiders import InDomainGuider, InDomainSampler, MultiGuidanceGuider
    from .loaders import LoadDomainUNet, LoadMiniWorld
    from .terms import GuidanceTerm, ShapeGuidanceTerm
    from .text_free import TextFreeUNet
    from .training import DomainTrainingOptions, MiniWorldImages, TrainDomainUNet

    return [
        LoadMiniWorld,
        LoadDomainUNet,
        TextFreeUNet,
        MiniWorldImages,
        TrainDomainUNet,
        DomainTrainingOptions,
        InDomainSampler,
        InDomainGuider,
        GuidanceTerm,
        ShapeGuidanceTerm,
        MultiGuidanceGuider,
        LoadGenerator,
        GeneratorSample,
        AdaptGenerator,
        GeneratorAdaptOptions,
        BlendGenerators,
        SaveGenerator,
        BakeDomainLoRA,
        BakeDomainOptions,
    ]


def create_extension():
    """The `ComfyExtension` that ComfyUI's entry point hands over. Needs ComfyUI."""
    from comfy_api.latest import ComfyExtension

    from .comfy_internals.models.folders import DOMAIN_UNETS, GENERATORS

    class InDomainGuidanceExtension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            # Here and not in on_load, which ComfyUI 0.3.75 never calls; the loaders' schemas list the folders.
            DOMAIN_UNETS.register()
            GENERATORS.register()
            return node_classes()

    return InDomainGuidanceExtension()
