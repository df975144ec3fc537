"""ComfyUI-EMMA: text and reference images together steer a frozen Stable Diffusion model (arXiv 2406.09162)."""

WEB_DIRECTORY = "web"  # help pages of the nodes, their colours, and what the editor does for graphs of before


async def comfy_entrypoint():
    """The host calls this once; everything is imported here, so that importing the package costs nothing."""
    from .host.paths import register_folders
    from .nodes import EmmaExtension

    register_folders()
    return EmmaExtension()
