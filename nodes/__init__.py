"""The ComfyUI nodes: thin adapters around `guidance`, one file per family."""

from __future__ import annotations


def node_classes() -> list[type]:
    """Every node of the pack, in the order in which the editor's menu should list them."""
    from .guiders import GuidanceTerm, InDomainGuider, InDomainSampler, MultiGuidanceGuider
    from .loaders import LoadDomainUNet, LoadMiniWorld
    from .text_free import TextFreeUNet

    return [
        LoadMiniWorld,
        LoadDomainUNet,
        TextFreeUNet,
        InDomainSampler,
        InDomainGuider,
        GuidanceTerm,
        MultiGuidanceGuider,
    ]


def create_extension():
    """The `ComfyExtension` that ComfyUI's entry point hands over. Needs ComfyUI."""
    from comfy_api.latest import ComfyExtension

    from .comfy_internals.loading import register_domain_unet_folder

    class InDomainGuidanceExtension(ComfyExtension):
        async def on_load(self) -> None:
            register_domain_unet_folder()

        async def get_node_list(self) -> list[type]:
            return node_classes()

    return InDomainGuidanceExtension()
