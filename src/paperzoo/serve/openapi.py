"""The service's OpenAPI document, made from what the models said about themselves."""

from __future__ import annotations

from typing import Any

import paperzoo
from paperzoo.serve.limits import MOST_INPUTS

ERRORS = {
    "400": "The body is not JSON, no form, or breaks the protocol.",
    "401": "A bearer token is needed.",
    "403": "This is not allowed.",
    "404": "There is no such model.",
    "405": "Another method is needed.",
    "408": "The request's body did not arrive in time.",
    "413": "The body, its pictures, a text, or the number of inputs is too large.",
    "415": "The content type is not one that the model takes.",
    "422": "An input is not what the model takes.",
    "429": "The queue is full; try again.",
    "500": "The model failed.",
    "503": "The model, or its process, is not there now; try again.",
    "504": "There was no answer within the time limit.",
}
OPEN = [{}]  # of "security": for anybody
ERROR = {"$ref": "#/components/schemas/Error"}


def document(models: dict[str, dict[str, Any]], secured: bool) -> dict[str, Any]:
    """OpenAPI 3.1; `models` is name -> description, see `paperzoo.serve.worker`."""
    paths: dict[str, Any] = {
        "/health": {"get": operation("health", "Whether the service runs.", ["service"], ok("It does."), open=True)},
        "/ready": {"get": operation("ready", "Whether every model can answer.", ["service"], readiness(), open=True)},
        "/models": {"get": operation("models", "The models and what they take.", ["service"], ok("The models."))},
        "/metrics": {"get": operation("metrics", "Counts for Prometheus.", ["service"], metrics_text())},
        "/v2": {"get": operation("v2_server", "The server, for v2 clients.", ["v2"], ok("Its name and version."))},
        "/v2/health/live": {"get": operation("v2_live", "Whether the service runs.", ["v2"], ok("Yes."), open=True)},
        "/v2/health/ready": {
            "get": operation("v2_ready", "Whether all models are up.", ["v2"], readiness(), open=True)
        },
    }
    for name, model in models.items():
        paths |= predicting(name, model) | inferring(name, model)
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "PaperZoo models",
            "version": paperzoo.__version__,
            "description": "Predictions by typed endpoints, and by the Open Inference Protocol (v2).",
        },
        "paths": paths,
        "components": {
            "schemas": {
                "Error": {
                    "type": "object",
                    "properties": {"error": {"type": "string"}, "request_id": {"type": "string"}},
                    "required": ["error", "request_id"],
                }
            }
        },
    }
    if secured:
        found["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"bearer": []}]
    return found


def operation(
    identity: str,
    summary: str,
    tags: list[str],
    answers: dict[str, Any],
    errors: tuple[str, ...] = ("401", "403", "405"),
    open: bool = False,
    **more: Any,
) -> dict[str, Any]:
    responses = answers | {
        code: {"description": ERRORS[code], "content": {"application/json": {"schema": ERROR}}}
        for code in errors
        if code not in answers
    }
    found = {"operationId": identity, "summary": summary, "tags": tags, "responses": responses, **more}
    return found | ({"security": OPEN} if open else {})


def ok(description: str, schema: dict[str, Any] | None = None, example: Any = None) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": schema or {"type": "object"}}
    if example is not None:
        content["example"] = example
    return {"200": {"description": description, "content": {"application/json": content}}}


def readiness() -> dict[str, Any]:
    return ok("Yes.") | {"503": {"description": "Not now.", "content": {"application/json": {"schema": {}}}}}


def metrics_text() -> dict[str, Any]:
    return {"200": {"description": "The counts.", "content": {"text/plain": {"schema": {"type": "string"}}}}}


# -- a model -----------------------------------------------------------------------------------------------------------

ASKED = ("400", "401", "403", "405", "408", "413", "415", "422", "429", "500", "503", "504")


def predicting(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """/predict/{name}: JSON, a form, or a file."""
    one, answer = model["input"], model["answer"]
    body = {
        "oneOf": [
            {
                "type": "object",
                "properties": {"input": one},
                "required": ["input"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {
                    "inputs": {"type": "array", "items": one, "minItems": 1, "maxItems": MOST_INPUTS},
                },
                "required": ["inputs"],
                "additionalProperties": False,
            },
        ]
    }
    examples = {
        "one": {"summary": "one input", "value": {"input": model["example"]}},
        "several": {"summary": "several inputs", "value": {"inputs": [model["example"]] * 2}},
    }
    content: dict[str, Any] = {"application/json": {"schema": body, "examples": examples}}
    if model["files"]:
        file = {"type": "string", "contentMediaType": "application/octet-stream"}
        form: dict[str, Any] = {"file": {"type": "array", "items": file, "minItems": 1, "maxItems": MOST_INPUTS}}
        content["multipart/form-data"] = {"schema": {"type": "object", "properties": form, "required": ["file"]}}
        for media in model["files"]:
            content[media.replace("image/*", "image/png")] = {"schema": file}
    answers = {
        "type": "object",
        "properties": {
            "model": {"type": "string"},
            "result": answer,
            "results": {"type": "array", "items": answer},
            "picture": {"type": ["string", "null"]},
            "pictures": {"type": "array", "items": {"type": ["string", "null"]}},
        },
        "required": ["model"],
    }
    switches = [
        {"name": "draw", "in": "query", "schema": {"type": "boolean"}, "description": "Draw each result on its input."},
        {"name": "brief", "in": "query", "schema": {"type": "boolean"}, "description": "Describe large arrays only."},
    ]
    done = operation(
        f"predict_{name}",
        f"Predict with {name}.",
        [name],
        ok("The result, or the results.", answers, {"model": name, "result": model["example_answer"]}),
        ASKED,
        parameters=switches,
        requestBody={"required": True, "content": content},
    )
    return {f"/predict/{name}": {"post": done}}


def inferring(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """The model's part of the Open Inference Protocol."""
    known = [t["name"] for t in model["metadata"]["inputs"]]
    tensor = {
        "type": "object",
        "properties": {
            "name": {"enum": known},
            "datatype": {"type": "string"},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "maxItems": 8},
            "parameters": {"type": "object"},
            "data": {"type": "array"},
        },
        "required": ["name", "datatype", "shape"],
    }
    body = {
        "type": "object",
        "properties": {
            "id": {"type": "string", "maxLength": 200},
            "parameters": {"type": "object"},
            "inputs": {"type": "array", "items": tensor, "minItems": 1},
            "outputs": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}},
        },
        "required": ["inputs"],
    }
    done = {
        "type": "object",
        "properties": {"model_name": {"const": name}, "outputs": {"type": "array"}},
        "required": ["model_name", "outputs"],
    }
    content = {"application/json": {"schema": body}, "application/octet-stream": {"schema": {"type": "string"}}}
    inference = operation(
        f"v2_infer_{name}",
        f"Infer with {name}, for v2 clients.",
        ["v2"],
        answered(done),
        ASKED,
        requestBody={"required": True, "content": content},
    )
    metadata = operation(
        f"v2_model_{name}", f"The tensors of {name}.", ["v2"], ok("Its metadata.", None, model["metadata"])
    )
    ready = operation(f"v2_ready_{name}", f"Whether {name} can answer.", ["v2"], readiness())
    base = f"/v2/models/{name}"
    return {f"{base}/infer": {"post": inference}, base: {"get": metadata}, f"{base}/ready": {"get": ready}}


def answered(schema: dict[str, Any]) -> dict[str, Any]:
    """JSON, or JSON with the binary part of the tensors behind it."""
    found = ok("The outputs.", schema)
    found["200"]["content"]["application/octet-stream"] = {"schema": {"type": "string"}}
    return found
