"""In-Domain Guidance for ComfyUI.

ComfyUI imports this file at start-up, so it does no work: the nodes and what they need are imported when ComfyUI
asks for them. As a library, import `indomain_guidance.guidance`, which does not need ComfyUI.
"""

# ComfyUI serves everything in this folder to the browser. It holds the help pages of the nodes (docs/*.md) and
# nothing else.
WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """The V3 entry point: returns the extension that lists the nodes."""
    from .nodes import create_extension

    return create_extension()
