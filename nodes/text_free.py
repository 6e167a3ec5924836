"""Text-Free UNet: from a prior and its text encoder to a domain model that has learned nothing yet."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..guidance.errors import printable
from .comfy_internals.models import export
from .inputs import checked
from .widgets import TRAINING, schema


class TextFreeUNet(io.ComfyNode):
    """A prior's UNet with the empty prompt frozen in, as a file and as a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InDomainTextFreeUNet",
            display_name="Text-Free UNet",
            category=TRAINING,
            search_aliases=["domain model", "unconditional", "null text", "export"],
            advanced=["file_dtype", "probe_size"],
            description="Takes the text out of the prior's UNet and reports what that costs: an untrained domain "
            "model. Train Domain UNet begins from the prior and needs no such file. Weight patches (LoRA) on the model "
            "are baked in. The file lands in models/domain_unets.",
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The prior: a Stable Diffusion 1.x, 2.x or XL model, or the mini world's."
                ),
                io.Clip.Input(
                    "clip", tooltip="The prior's own text encoder. It encodes the empty prompt, nothing else."
                ),
                io.Combo.Input(
                    "form",
                    options=["cached", "constant"],
                    default="cached",
                    tooltip="cached: keeps the empty prompt's keys and values; equals the prior on the empty prompt "
                    "until it is trained. constant: one constant a block, the paper's form; smaller and faster, but an "
                    "approximation, whose error is reported.",
                ),
                io.String.Input(
                    "filename",
                    default="text_free",
                    tooltip="Name of the file in models/domain_unets, with or without .safetensors; subfolders are "
                    "allowed. An untrained file of that name is replaced, a trained one never.",
                ),
                io.Combo.Input(
                    "file_dtype",
                    options=list(export.DTYPES),
                    default="fp16",
                    tooltip="Number format in the file. fp16 and bf16 take 2 bytes a weight, fp32 takes 4 and rounds "
                    "nothing that the prior has.",
                ),
                io.Int.Input(
                    "probe_size",
                    default=0,
                    min=0,
                    max=2048,
                    step=64,
                    tooltip="constant only: side in pixels of the images on which the constants are measured, up to "
                    "2048. 0 is the size the prior was made for (1024 for SDXL). No effect on cached.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The text-free model, loaded from the new file."),
                io.String.Output(
                    display_name="report", tooltip="What was made: sizes, the error of each block and of the output."
                ),
            ],
        )

    @classmethod
    @checked()
    def execute(cls, model, clip, form: str, filename: str, file_dtype: str, probe_size: int) -> io.NodeOutput:
        path = export.output_path(filename)
        made, report = export.make_text_free(model, clip, form, path, file_dtype, probe_size)
        return io.NodeOutput(made, report, ui=ui.PreviewText(printable(report, len(report) + 1)))
