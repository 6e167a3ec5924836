"""The compared methods: a row each. Another method or rival is a row in METHODS and its points in `sweep.py`."""

from __future__ import annotations

from ..methods import CONTROL, DOMAIN, TUNED, Method, named

PRIOR = (("control", "prior", "cond", "scale"),)
# Of a baked model u'', c'': plain CFG, u'' + scale (c'' - u''); "student": guidance of three predictions in which its
# u'' - u takes the place of the domain model's d - u.
METHODS = {
    "prior": Method("prior", "prior", PRIOR),
    "domain": Method("domain", "domain model alone", (("domain", "trained", "uncond", "scale"),)),
    "multi_guidance": Method("constant", "guidance, constant weights", (DOMAIN, CONTROL)),
    "late_start": Method("late", "guidance, late start", (DOMAIN, CONTROL)),
    "baked": Method("baked", "baked LoRA", (TUNED,), base="trained"),
    "baked_late": Method("baked", "baked LoRA, late start", (TUNED,), base="trained"),
    "baked_guided": Method("guided", "baked LoRA of the guided prediction", (TUNED,), base="trained"),
    "ablation": Method("ablation", "ablation: ", (TUNED,), base="trained"),
    "student": Method("student", "guidance by the baked LoRA's own change", (DOMAIN, CONTROL)),
    "fine_tune": Method("fine_tune", "", (TUNED,), base="trained"),
    "fine_tune_prior_u": Method("fine_tune", ", prior's u", (TUNED,)),
    # Image to image, from printed digits.
    "prior_img2img": Method("img2img", "prior, image to image", PRIOR),
    "guidance_img2img": Method("img2img", "guidance, image to image", (DOMAIN, CONTROL)),
    "baked_img2img": Method("img2img", "baked LoRA, image to image", (TUNED,), base="trained"),
}
BAKED, FINE_TUNES = (named(METHODS, role) for role in ("baked", "fine_tune"))
# Points that look at predictions instead of pictures (`predictions.py`).
TEXT_KEPT, OTHER_LORA = "text_kept", "other_lora"
