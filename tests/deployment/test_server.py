import asyncio
import base64
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from vmamba.data.transforms import Preprocessing
from vmamba.deployment.batching import Batcher, QueueFullError
from vmamba.deployment.predictor import Predictor, predictor_of_file
from vmamba.deployment.requests import Limits
from vmamba.deployment.server import make_app

LIMITS = Limits(bytes=200_000, pixels=10_000, images=4, queue=8, read_seconds=0.5, answer_seconds=5)


def mean_of_channels(batch):
    """A model of three classes: which of red, green and blue there is most of."""
    return batch.mean(axis=(2, 3)) * 10


def make_predictor(logits=mean_of_channels):
    return Predictor("colours", "v1", ("red", "green", "blue"), Preprocessing(img_size=32, crop_pct=1.0), logits)


def png(colour=(255, 0, 0), size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def client():
    with TestClient(make_app(make_predictor(), LIMITS)) as made:
        yield made


def post(client, content, kind="image/png", **options):
    return client.post("/predict", content=content, headers={"Content-Type": kind}, **options)


def test_bytes_of_one_image(client):
    answer = post(client, png(), params={"top": 2})
    assert answer.status_code == 200
    assert answer.json()["model"] == {"name": "colours", "version": "v1"}
    first, second = answer.json()["predictions"]
    assert first["label"] == "red"
    assert first["confidence"] > second["confidence"]
    assert post(client, png((0, 0, 255)), "application/octet-stream").json()["predictions"][0]["label"] == "blue"


def test_form_with_one_image_or_several(client):
    single = client.post("/predict", files={"image": png((0, 255, 0))}).json()
    assert single["predictions"][0]["label"] == "green"
    several = client.post("/predict", files=[("images", png()), ("images", png((0, 0, 255)))]).json()
    assert [result[0]["label"] for result in several["results"]] == ["red", "blue"]


def test_json_with_one_image_or_several(client):
    text = base64.b64encode(png()).decode()
    assert client.post("/predict", json={"image": text}).json()["predictions"][0]["label"] == "red"
    assert client.post("/predict", json={"image": f"data:image/png;base64,{text}"}).status_code == 200
    results = client.post("/predict", json={"images": [text]}).json()["results"]
    assert [result[0]["label"] for result in results] == ["red"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "words"),
    [
        (b"", "image/png", 422, "the image is empty"),
        (b"not an image", "image/png", 422, "not in a known image format"),
        (png()[:60], "image/png", 422, "cannot be decoded"),
        (png(size=(200, 100)), "image/png", 413, "200×100 pixels"),
        (png(size=(1000, 2)), "image/png", 422, "no side may be 100 times the other"),
        (b"x" * 200_001, "image/png", 413, "200000 bytes"),
        (png(), "text/plain", 415, "'text/plain' is not understood"),
        (png(), "", 415, "is not understood"),
        (b"{", "application/json", 400, "not JSON"),
        (b"[" * 100_000, "application/json", 400, "not JSON"),
        (b"[]", "application/json", 422, "must be an object"),
        (b"{}", "application/json", 422, "either `image` or `images`"),
        (b'{"image": "a", "images": []}', "application/json", 422, "either `image` or `images`"),
        (b'{"image": "a", "top": 3}', "application/json", 422, "'top', which is not known"),
        (b'{"image": 3}', "application/json", 422, "`image` must be a text"),
        (b'{"image": "\xc3\xa9"}', "application/json", 422, "not base64"),
        (b'{"images": {}}', "application/json", 422, "`images` must be a list"),
        (b'{"images": []}', "application/json", 422, "no image"),
        (b'{"images": ["", "", "", "", ""]}', "application/json", 413, "5 images in one request"),
        (b"x", "multipart/form-data", 400, "form cannot be read"),
        (b"x", "multipart/form-data; boundary=b", 400, "form cannot be read"),
        (b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\ntext\r\n--b--\r\n',
         "multipart/form-data; boundary=b", 422, "holds no file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(client, content, kind, status, words):
    answer = post(client, content, kind)
    assert answer.status_code == status
    assert words in answer.json()["detail"]
    assert answer.json()["model"]["version"] == "v1"


def test_paths_methods_and_parameters(client):
    assert "there is no /nothing here" in client.get("/nothing").json()["detail"]
    assert client.get("/predict").status_code == 405
    answer = post(client, png(), params={"top": 0})
    assert answer.status_code == 422
    assert "top" in answer.json()["detail"]


def test_bomb_is_refused_by_its_head(client):
    """A PNG that says it has 60,000 × 60,000 pixels, in a few bytes."""
    buffer = io.BytesIO()
    Image.new("1", (60_000, 600)).save(buffer, "png")
    answer = post(client, buffer.getvalue())
    assert answer.status_code == 413


def test_health_metrics_and_description(client):
    post(client, png())
    assert client.get("/health").json()["status"] == "ok"
    told = client.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    assert 'vmamba_requests_total{path="/predict",status="200"} 1.0' in told.text
    assert "vmamba_images_total 1.0" in told.text
    assert set(client.get("/openapi.json").json()["paths"]) == {"/predict", "/health", "/metrics"}
    assert client.get("/docs").status_code == 200


def test_token():
    with TestClient(make_app(make_predictor(), LIMITS, token="secret")) as client:
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer é"},
        ):
            headers = {name: value.encode() for name, value in given.items()}
            answer = client.post("/predict", content=png(), headers={"Content-Type": b"image/png", **headers})
            assert answer.status_code == 401
            assert "Bearer" in answer.json()["detail"]
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == 200
        headers = {"Content-Type": "image/png", "Authorization": "Bearer secret"}
        assert client.post("/predict", content=png(), headers=headers).status_code == 200


def test_full_queue_is_told():
    go = threading.Event()

    def slow(batch):
        go.wait(10)
        return mean_of_channels(batch)

    app = make_app(make_predictor(slow), Limits(images=4, queue=4), max_batch=1)
    with TestClient(app) as client:
        four = [("images", png())] * 4
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(client.post("/predict", files=four)))]
        threads[0].start()
        deadline = time.monotonic() + 10
        while "vmamba_queue_images 3.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
        refused = client.post("/predict", files=four)
        go.set()
        threads[0].join()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert "queue" in refused.json()["detail"]
    assert [answer.status_code for answer in answers] == [200]


def test_slow_body_is_told():
    async def talk():
        app = make_app(make_predictor(), LIMITS)
        sent = []
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/predict",
            "raw_path": b"/predict", "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [(b"content-type", b"image/png")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        first = [{"type": "http.request", "body": b"x", "more_body": True}]

        async def receive():
            if first:
                return first.pop()
            return await asyncio.sleep(60)

        async def send(message):
            sent.append(message)

        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app(scope, receive, send), 10)
        return sent

    start, *rest = asyncio.run(talk())
    assert start["status"] == 408
    assert "did not arrive" in json.loads(b"".join(message.get("body", b"") for message in rest))["detail"]


def test_batches_are_shared_and_answers_find_their_owner():
    sizes = []

    async def work():
        batcher = Batcher(lambda batch: batch * 2, max_batch=4, wait=0.05, capacity=100, observe=sizes.append)
        batcher.start()
        answers = await asyncio.gather(*(batcher.submit([np.full(3, i)]) for i in range(10)))
        await batcher.stop()
        return answers

    answers = asyncio.run(work())
    assert [answer[0].tolist() for answer in answers] == [[2 * i] * 3 for i in range(10)]
    assert sizes == [4, 4, 2]


def test_batcher_finishes_what_it_accepted_and_survives_errors():
    async def work():
        def run(batch):
            if batch.max() == 3:
                raise ArithmeticError("no")
            return batch

        batcher = Batcher(run, max_batch=1, wait=0, capacity=5)
        batcher.start()
        tasks = [asyncio.create_task(batcher.submit([np.full(1, i)])) for i in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="5 may"):
            await batcher.submit([np.zeros(1)] * 6)
        await batcher.stop()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(work())
    assert isinstance(answers[3], ArithmeticError)
    assert [answer[0][0] for i, answer in enumerate(answers) if i != 3] == [0, 1, 2, 4]


def test_exported_file_behind_the_server(onnx_report, encoded):
    predictor = predictor_of_file(onnx_report.path, threads=1)
    with TestClient(make_app(predictor)) as client:
        answer = post(client, encoded).json()
    assert answer["model"]["version"] == predictor.version
    image = predictor.image_to_array(Image.open(io.BytesIO(encoded)).convert("RGB"))
    best = predictor.probabilities(image[None])[0]
    assert answer["predictions"][0]["index"] == int(best.argmax())
    assert answer["predictions"][0]["label"] == f"class {best.argmax()}"
    assert answer["predictions"][0]["confidence"] == pytest.approx(best.max(), abs=1e-5)
