"""In-Domain Guidance for ComfyUI.

ComfyUI imports this file at start-up, so it does no work: the nodes and what they need are imported when ComfyUI
asks for them. As a library, import `indomain_guidance.guidance`, which does not need ComfyUI.
"""

# ComfyUI serves this folder to the browser, where the editor looks for the help pages in its `docs` folder.
WEB_DIRECTORY = "./nodes"


async def comfy_entrypoint():
    """The V3 entry point: returns the extension that lists the nodes."""
    from .nodes import create_extension

    return create_extension()
