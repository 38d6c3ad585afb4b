"""The model registry: MLflow's, in a SQLite file by default, on any tracking server by its URI.

One call registers an artifact as a version of a registered model, in two forms:

    packed         the artifact where it lies: the version's source
    dequantised    the ordinary safetensors folder that it decodes to, written here for it

A version's tags describe it, so that they appear with the version or not at all:

    manifest_sha256                   the packed artifact's, which holds the hashes of all its files
    dequantised_source, _fingerprint, and _bytes: where that form lies, its hash as `LanguageModel.fingerprint`, its size
    base, base_sha256                 the model that all of it comes from
    parent_sha256, parent_version     the model that it was made from, and where that is registered
    settings, bytes, ratios           the recipe, weight files on disk, ratios with their denominators
    metric.NAME                       measurements, whole: value, standard error, n, protocol
    metric.dequantised.NAME           the same of the dequantised form
    handoff, handoff_reason           passed, failed or none

A call is a transaction under a lock.  A kill leaves whole versions only.  The lock is of this machine: two machines that
register one artifact on a server at the same moment may make it two versions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import handoff, schemas
from .artifact import MANIFEST, Artifact, dequantize
from .errors import BadInput
from .folders import locked, remove
from .models import cache_dir
from .opening import open_model
from .tensorfiles import plain_file, read_json

EXPERIMENT = "agentforge"  # that runs belong to, on a server
LARGEST_RECORD = 64 << 20
LONGEST_TAG = 90_000  # MLflow takes 100,000 characters
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Registered(NamedTuple):
    """name: of the registered model.  packed, dequantised: the version, which holds both forms.  new: False if the artifact
    was there."""

    name: str
    packed: int
    dequantised: int
    new: bool


def register(
    path: str | Path,
    *,
    name: str | None = None,
    uri: str | None = None,
    record: str | Path | None = None,
    aliases: tuple[str, ...] = (),
    handed: str | Path | None = None,
) -> Registered:
    """Check an artifact, every byte of it, and register it with the model that it decodes to.

    name: of the registered model (default: the base model's).  uri: see `registry_uri`.  record: a file of measurements, an
    audit's record or what `agentforge evaluate --json` printed; those of this artifact are taken.  aliases: that shall lead
    to the version.  handed: the folder of a hand-off that the artifact is part of; it is checked, and the outcome recorded.
    An artifact that is there already gets the new metrics and aliases, and no new version.

    Raises BadInput if the artifact is damaged, or anything else cannot be used; nothing is registered then.
    """
    _mlflow()
    artifact = Artifact(Path(path).expanduser().resolve())
    sha256 = artifact.sha256
    artifact.verify()
    uri = registry_uri(uri)
    name = _name_of(artifact) if name is None else _checked(name, r"\w[\w. -]{0,199}", "name", "letters, digits, _ . -")
    for alias in aliases:
        _checked(alias, r"(?![vV]\d+$|(?i:latest)$)[\w-]{1,200}", "alias", "letters, digits, _ -, no version and not latest")
    status = _handed(Path(handed).expanduser(), sha256) if handed is not None else {}
    with _opened(uri) as client:
        folder, fingerprint = _dequantised(artifact, sha256, uri)
        metrics = _metrics(Path(record).expanduser(), sha256, fingerprint) if record is not None else {}
        known = _lineage(client, artifact) | status | metrics
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        there = _versions(client, f"name = '{name}' and tags.manifest_sha256 = '{sha256}'")
        if new := not there:
            source, run = (str(artifact.path), None) if _sqlite_file(uri) else _upload(client, artifact, folder, sha256)
            other = str(folder) if run is None else source.removesuffix("packed") + "dequantised"
            tags = {"handoff": "none", "dequantised_source": other, **_about(artifact, sha256, folder, fingerprint), **known}
            there = [client.create_model_version(name, source, run_id=run, tags=tags)]
        number = str(there[0].version)
        for key, value in known.items():
            if there[0].tags.get(key) != value:
                client.set_model_version_tag(name, number, key, value)
        for alias in aliases:
            client.set_registered_model_alias(name, alias, number)
    return Registered(name, int(number), int(number), new)


def registered(uri: str | None = None) -> list[dict[str, Any]]:
    """Every version that agentforge registered: name, version, source, aliases, metrics (measurements as JSON objects) and
    the other tags.

    Raises BadInput if the registry cannot be read; one that does not exist yet holds nothing.
    """
    uri = registry_uri(uri)
    if (file := _sqlite_file(uri)) is not None and not file.exists():
        return []
    rows = []
    with _talking(uri):
        client = _client(uri)
        aliases = {model.name: model.aliases for model in _pages(client.search_registered_models, "")}
        for version in _versions(client, ""):
            row = {"name": version.name, "version": int(version.version), "source": version.source}
            row["aliases"] = sorted(a for a, v in aliases.get(version.name, {}).items() if int(v) == int(version.version))
            metrics = {key: value for key, value in version.tags.items() if key.startswith("metric.")}
            row["metrics"] = {key.removeprefix("metric."): json.loads(value) for key, value in metrics.items()}
            row["tags"] = {key: value for key, value in version.tags.items() if key not in metrics}
            rows.append(row)
    return rows


def registry_uri(given: str | None = None) -> str:
    """The URI asked for, else AGENTFORGE_REGISTRY, else that of a SQLite file in agentforge's cache.

    Raises BadInput for what is not an URI.
    """
    uri = given or os.environ.get("AGENTFORGE_REGISTRY") or f"sqlite:///{cache_dir().absolute() / 'registry/mlflow.db'}"
    if not re.fullmatch(r"sqlite:///[^?#]+|(?!sqlite:)[a-z][a-z0-9+.-]*://.+", uri):
        raise BadInput(f"registry {uri[:80]!r}; expected a URI such as sqlite:////folder/mlflow.db or http://host:5000")
    return uri


def _checked(value: str, pattern: str, what: str, expected: str) -> str:
    if not re.fullmatch(pattern, value, re.ASCII):
        raise BadInput(f"{what} {value[:80]!r}; expected {expected}")
    return value


def _name_of(artifact: Artifact) -> str:
    """The base model's name, in letters that MLflow takes."""
    original = artifact.manifest["original"]
    named = original["source"].get("name")
    name = re.sub(r"[^\w.-]+", "-", named if isinstance(named, str) else original["name"], flags=re.ASCII).strip(".-")
    return name[:200] or "model"


def _mlflow() -> Any:
    """MLflow, with its telemetry off.  Raises BadInput if it is not installed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own seven take minutes to say that nobody is there
    try:
        import alembic  # noqa: F401
        import mlflow
        import sqlalchemy  # noqa: F401
    except ImportError as error:
        raise BadInput(f"the registry needs the package {error.name}; pip install 'agentforge[registry]'") from None
    for name in ("mlflow.store", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def _client(uri: str) -> Any:
    return _mlflow().MlflowClient(uri, uri)


@contextlib.contextmanager
def _talking(uri: str) -> Iterator[None]:
    """Errors of MLflow and of the database as one sentence."""
    mlflow = _mlflow()
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (mlflow.MlflowException, SQLAlchemyError, ImportError) as error:  # a database has no driver here
        message = (
            f"registry {uri:.200}: {' '.join(str(error).split())[:300]}; check the registry and run the same command again"
        )
        raise BadInput(re.sub(r"//[^@ ]*@", "//", message)) from None  # no user and password on the screen


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[Any]:
    """MLflow's client, for one process of this machine at a time."""
    file = _sqlite_file(uri)
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    lock = file.with_name(file.name + ".lock") if file else cache_dir() / "registry" / f"{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _talking(uri), locked(lock, lock, wait=True):
        if file is not None and not file.exists():
            # Made beside and renamed: a kill among MLflow's migrations would leave a database that none can open.
            with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as partial:
                _client(f"sqlite:///{Path(partial) / file.name}").search_registered_models(max_results=1)
                os.replace(Path(partial) / file.name, file)
        yield _client(uri)


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:") else None


def _pages(search: Any, query: str) -> list[Any]:
    """All that a search finds, page by page."""
    page = search(query, max_results=1000)
    found = list(page)
    while page.token:
        page = search(query, max_results=1000, page_token=page.token)
        found += page
    return found


def _versions(client: Any, query: str) -> list[Any]:
    """Our versions that a query finds, by name and number.  Dequantised forms, which an older registry has as versions of
    their own, are left out."""
    found = [v for v in _pages(client.search_model_versions, query) if "manifest_sha256" in v.tags]
    ours = [version for version in found if version.tags.get("form", "packed") == "packed"]
    return sorted(ours, key=lambda version: (version.name, int(version.version)))


def _dequantised(artifact: Artifact, sha256: str, uri: str) -> tuple[Path, str]:
    """The folder of the dequantised form, in the registry's own folder, made if it is not there as it was written, and its
    fingerprint.

    bfloat16 if the original is all of that, else float32, which holds every decoded value as it is.
    """
    file = _sqlite_file(uri)
    folder = (file.parent if file else cache_dir() / "registry") / "dequantised" / sha256
    with contextlib.suppress(BadInput):  # what it raises for a file that is not as `dequantize` wrote it
        model = open_model(folder)
        if model.source.get("artifact_manifest_sha256") == sha256:
            return folder, model.fingerprint
    remove(folder)
    folder.parent.mkdir(exist_ok=True)
    dtype = torch.bfloat16 if artifact.manifest["original"]["dtypes"] == "bfloat16" else torch.float32
    dequantize(artifact, folder, dtype)
    return folder, open_model(folder).fingerprint


def _about(artifact: Artifact, sha256: str, folder: Path, fingerprint: str) -> dict[str, str]:
    """The tags that an artifact itself gives."""
    recipe = artifact.manifest["recipe"]
    settings = json.dumps(recipe, sort_keys=True)
    if len(settings) > LONGEST_TAG:  # a setting for every weight: the manifest has them
        stage = {key: value for key, value in recipe["stage"].items() if key != "weights"}
        settings = json.dumps({**recipe, "stage": stage}, sort_keys=True)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "manifest_sha256": sha256,
        "settings": settings,
        "bytes": str(artifact.weight_bytes),
        "ratios": json.dumps([ratio.to_json() for ratio in artifact.ratios]),
        "dequantised_fingerprint": fingerprint,
        "dequantised_bytes": str(weights),
    }


def _lineage(client: Any, artifact: Artifact) -> dict[str, str]:
    """The base model of an artifact, and the model it was made from.

    A chain's later steps name the step before alone: their base is known once that is registered, too.
    """
    original, recipe = artifact.manifest["original"], artifact.manifest["recipe"]
    parent, base, source = recipe.get("artifact", original.get("fingerprint")), original.get("fingerprint"), original
    while isinstance(source, dict) and "fingerprint" in source:
        base, source = source["fingerprint"], source.get("source")
    tags = {"base": _name_of(artifact), "base_sha256": str(base)}
    if isinstance(parent, str) and _SHA256.fullmatch(parent):
        tags["parent_sha256"] = parent
        if found := _versions(client, f"tags.manifest_sha256 = '{parent}'"):
            tags["parent_version"] = f"{found[0].name}/{found[0].version}"
            tags["base_sha256"] = found[0].tags["base_sha256"]
    return tags


def _handed(folder: Path, sha256: str) -> dict[str, str]:
    """Whether a hand-off that this artifact is part of is accepted by its receiver."""
    data: Any = read_json(folder / handoff.HANDOFF, handoff.LARGEST)
    try:
        phase = int(data["phase"])
        parts = {about["files"].get(MANIFEST, {}).get("sha256") for about in data["models"].values()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"{folder / handoff.HANDOFF}: is not a hand-off; expected the folder that a phase has left") from None
    if sha256 not in parts:
        raise BadInput(f"{folder / handoff.HANDOFF}: does not hand over this artifact; expected the folder that does")
    try:
        handoff.check_handoff(folder, phase, progress=False)
    except BadInput as error:
        return {"handoff": "failed", "handoff_reason": str(error)}
    return {"handoff": "passed", "handoff_reason": f"phase {phase} to {handoff.contract(phase).to}"}


def _metrics(path: Path, sha256: str, fingerprint: str) -> dict[str, str]:
    """The measurements in a file that were taken of the artifact, or of its dequantised form, as tags.

    Raises BadInput if the file holds something else than measurements, or none of this artifact.
    """
    data: Any = read_json(path, LARGEST_RECORD)
    parts = [data[key] if isinstance(data.get(key), dict) else {} for key in ("measurements", "tasks")]
    rows = [row for row in data["claims"] if isinstance(row, dict)] if isinstance(data.get("claims"), list) else []
    measured = [
        *parts[0].items(),
        *((name, task.get("accuracy") if isinstance(task, dict) else task) for name, task in parts[1].items()),
        *((str(row.get("id")), row["measured"]) for row in rows if row.get("measured") is not None),
    ]
    found: dict[str, str] = {}
    for name, m in measured:
        if wrong := schemas.problem("measurement", m):
            raise BadInput(f"{path}: {name:.80}: no measurement ({wrong})")
        value = json.dumps({key: part for key, part in m.items() if key != "environment"}, sort_keys=True)
        if len(value) > LONGEST_TAG or not math.isfinite(m["value"]):
            raise BadInput(f"{path}: {name:.80}: a value that is not finite, or a measurement of {len(value)} characters")
        others = m["inputs"].get("artifacts")
        of = [m["inputs"].get("model"), *([*others.values()] if isinstance(others, dict) and len(others) == 1 else [])]
        for form, prefix in ((sha256, "metric."), (fingerprint, "metric.dequantised.")):
            if form in of:
                found[prefix + re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)[:200]] = value
    if found:
        return found
    raise BadInput(f"{path}: holds no measurement of this artifact; run agentforge evaluate ARTIFACT --json > FILE")


def _upload(client: Any, artifact: Artifact, folder: Path, sha256: str) -> tuple[str, str]:
    """Send both forms to a server, which takes no path of this machine, as one run's files; the same run after a kill.

    Returns where the packed form is, and the run's id."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    number = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    runs = client.search_runs([number], f"tags.manifest_sha256 = '{sha256}'", max_results=1)
    run = (
        runs[0] if runs else client.create_run(number, tags={"manifest_sha256": sha256}, run_name=f"register {sha256[:12]}")
    )
    for name in [*artifact.manifest["files"], MANIFEST]:
        client.log_artifact(run.info.run_id, str(plain_file(artifact.path, name)), "packed")
    client.log_artifacts(run.info.run_id, str(folder), "dequantised")
    client.set_terminated(run.info.run_id)
    return f"{run.info.artifact_uri}/packed", run.info.run_id
