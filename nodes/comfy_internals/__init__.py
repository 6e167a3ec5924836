"""Everything that touches ComfyUI's internals: what a new version of ComfyUI is checked against (`touched`)."""
