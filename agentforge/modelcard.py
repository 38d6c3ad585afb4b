"""The model card of an artifact, from its manifest."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from . import stages
from .artifact import Artifact
from .escaping import markdown
from .opening import SMOLLM2
from .tensorfiles import plain_file

if TYPE_CHECKING:
    from .evaluation import Measurement

TEMPLATE = str(Path(__file__).with_name("modelcard.jinja"))
# Where a model that agentforge can name itself comes from, on the hub.
HUB_IDS = {SMOLLM2["name"]: "HuggingFaceTB/SmolLM2-135M-Instruct"}
# How the texts of licences begin, and their names on the hub.
LICENCES = {"apache license": "apache-2.0", "mit license": "mit", "bsd 3-clause": "bsd-3-clause"}


def model_card(artifact: Artifact, measurements: Mapping[str, Measurement] | None = None, name: str = "FOLDER") -> str:
    """README.md for an artifact, with the front matter that the hub reads.

    measurements: of the artifact, by what was measured.  name: the folder or repository that it is loaded from.
    """
    from huggingface_hub import ModelCard, ModelCardData

    original = artifact.manifest["original"]
    base = HUB_IDS.get(str(original["source"].get("name")), original["name"])
    touched = [row for row in artifact.rows if row["stage"]]
    used = Counter(str(stages.from_json(row["stage"])) for row in touched)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None
    data = ModelCardData(
        license=licence(artifact),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["agentforge", *sorted({text.partition(":")[0] for text in used})],
        base_model=base if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
    )
    card = ModelCard.from_template(
        data,
        TEMPLATE,
        title=markdown(original["name"]),
        base=markdown(base),
        fingerprint=markdown(original["fingerprint"]),
        licence=markdown(licence(artifact)),
        touched=len(touched),
        artifact=artifact,
        used=used,
        measurements=measurements,
        markdown=markdown,
        quoted=json.dumps(name, ensure_ascii=False),  # one line, so that it cannot end the code
    )
    return str(card)


def licence(artifact: Artifact) -> str:
    """The base model's licence as the hub names it: as its source says, else by the licence file; "unknown" otherwise."""
    source = artifact.manifest["original"]["source"]
    if isinstance(said := source.get("licence"), str) and re.fullmatch(r"[\w.+ -]{1,64}", said):
        return said
    for name in artifact.manifest["files"]:
        if name.upper().startswith(("LICENSE", "LICENCE")):
            with plain_file(artifact.path, name).open(encoding="utf-8", errors="replace") as file:
                text = " ".join(file.read(1000).lower().split())
            for beginning, known in LICENCES.items():
                if text.startswith(beginning):
                    return known
    return "unknown"
