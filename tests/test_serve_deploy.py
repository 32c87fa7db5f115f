"""The files with which the service is deployed, and its page: what they must say, and that they fit the service."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path

import pytest

from paperzoo.errors import PaperZooError

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
if not DEPLOY.exists():
    pytest.skip("only in a checkout", allow_module_level=True)
yaml = pytest.importorskip("yaml")


def options() -> set[str]:
    """The options of the command."""
    from paperzoo.cli_serve import serve

    return {"--" + name.replace("_", "-") for name in inspect.signature(serve).parameters}


def test_the_image_is_slim_unprivileged_and_checked():
    lines = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text(encoding="utf-8")).splitlines()
    words = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {w for w, _ in words} <= {
        "FROM", "WORKDIR", "RUN", "ENV", "ARG", "COPY", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT"
    }  # fmt: skip
    bases = [rest for word, rest in words if word == "FROM"]
    assert all("-slim" in base for base in bases) and len(bases) == 2
    final = words[max(i for i, (word, _) in enumerate(words) if word == "FROM") :]
    names = [word for word, _ in final]
    user = next(rest for word, rest in final if word == "USER")
    assert user.split(":")[0].isdigit() and int(user.split(":")[0]) > 0
    assert names.index("USER") < names.index("ENTRYPOINT") and "/ready" in dict(final)["HEALTHCHECK"]
    assert dict(final)["STOPSIGNAL"] == "SIGTERM"
    for _, rest in words:
        for source in re.findall(r"(?:^|\s)(constraints\.txt|pyproject\.toml|README\.md|LICENSE|src|deploy/\S+)", rest):
            assert (ROOT / source).exists(), source


def test_the_entrypoint_serves_each_folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    (tmp_path / "models" / "lost+found").mkdir()
    (tmp_path / "paperzoo").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "paperzoo").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PAPERZOO_MODELS": str(tmp_path / "models")}
    done = subprocess.run(
        ["sh", str(DEPLOY / "entrypoint.sh"), "--workers", "2"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout.split()
    assert said[0] == "serve" and {f"cat={tmp_path}/models/cat", f"dog={tmp_path}/models/dog"} <= set(said)
    assert said[3:] == ["--workers", "2", "--host", "0.0.0.0", "--port", "8000"]


def test_the_kubernetes_example():
    parts = {p["kind"]: p for p in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))}
    assert set(parts) == {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}
    pod = parts["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    secure = container["securityContext"]
    assert secure["readOnlyRootFilesystem"] and not secure["allowPrivilegeEscalation"]
    assert secure["capabilities"]["drop"] == ["ALL"]
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
    assert pod["terminationGracePeriodSeconds"] > 35 + 5  # the time limit of a request, and the pause before the end
    labels = parts["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind, path in (("Service", ("selector",)), ("NetworkPolicy", ("podSelector", "matchLabels"))):
        found = parts[kind]["spec"]
        for key in path:
            found = found[key]
        assert found == labels
    assert parts["NetworkPolicy"]["spec"]["egress"] == []
    mounts = {m["name"] for m in container["volumeMounts"]}
    assert mounts == {v["name"] for v in pod["volumes"]}
    assert {a for a in container["args"] if a.startswith("--")} <= options()


def ray_arguments() -> dict:
    return yaml.safe_load((DEPLOY / "ray_serve.yaml").read_text(encoding="utf-8"))["applications"][0]


def test_the_ray_example_fits_the_application():
    from paperzoo.serve import scale

    found = ray_arguments()
    assert found["import_path"] == "paperzoo.serve.scale:application"
    options = scale.options_of(found["args"])
    assert options.wait and options.settings.threads == found["args"]["threads"]
    assert found["deployments"][0]["max_ongoing_requests"] >= options.settings.max_queue
    for bad in ({"models": []}, {"models": ["x"], "thread": 1}):
        with pytest.raises(PaperZooError, match="unknown or missing"):
            scale.options_of(bad)


def test_the_ray_example_is_valid_and_builds():
    pytest.importorskip("ray.serve", reason="needs Ray, of the extra scale")
    from ray.serve.schema import ServeDeploySchema

    from paperzoo.serve.scale import application

    text = (DEPLOY / "ray_serve.yaml").read_text(encoding="utf-8")
    assert ServeDeploySchema.model_validate(yaml.safe_load(text)).applications[0].name == "paperzoo"
    assert application(ray_arguments()["args"]) is not None


def test_the_page_is_whole():
    """Everything that its script looks for is there, nothing comes from elsewhere, and its policy knows what is inside."""
    from paperzoo.serve import try_page

    text, policy = try_page.page()
    wanted = set(re.findall(r'part\("([a-z-]+)"\)', text))
    assert wanted and wanted <= set(re.findall(r' id="([a-z-]+)"', text))
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text) and "innerHTML" not in text and " style=" not in text
    assert not re.findall(r"\son[a-z]+=", text) and policy.count("sha256-") == 2 and "unsafe" not in policy
    labels = set(re.findall(r'<label[^>]* for="([a-z-]+)"', text))
    assert set(re.findall(r'<(?:input|textarea|select) id="([a-z-]+)"', text)) <= labels
