"""`vmamba serve` under load, under malformed requests, and when it is told to end, on this machine alone.

    python benchmarks/serving.py load --checkpoint nano.safetensors     # 32 clients, a minute; batches of 16, then of 1
    python benchmarks/serving.py memory --checkpoint nano.safetensors --seconds 240   # resident memory, every 10 s
    python benchmarks/serving.py malformed --checkpoint nano.safetensors --count 10000
    python benchmarks/serving.py end --checkpoint nano.safetensors      # SIGTERM while 32 clients ask

Each starts a server of its own at 127.0.0.1, on a free port, and ends it.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from functools import cache

import httpx
import numpy as np
import psutil
from PIL import Image


def png(size=(32, 32), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@contextlib.contextmanager
def server(checkpoint, *options):
    words = [sys.executable, "-m", "vmamba", "serve", checkpoint, "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        yield process, re.search(r"http://\S+:(\d+)", line).group(0)
    finally:
        process.terminate()
        process.wait(90)


async def ask(url, clients, seconds):
    """Let clients ask one thing after another; return (status, seconds) of each, and of those that got no answer."""
    content, found, lost = png(), [], []
    until = time.monotonic() + seconds

    async def client():
        async with httpx.AsyncClient(timeout=90) as session:
            while time.monotonic() < until:
                start = time.perf_counter()
                try:
                    headers = {"Content-Type": "image/png"}
                    answer = await session.post(f"{url}/predict", content=content, headers=headers)
                except httpx.ConnectError:
                    return  # not accepted
                except httpx.HTTPError as error:
                    lost.append(repr(error))
                    return
                found.append((answer.status_code, time.perf_counter() - start))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found, lost


def load(args):
    rates = {}
    for batch in (16, 1):
        with server(args.checkpoint, "--max_batch", str(batch)) as (process, url):
            asyncio.run(ask(url, args.clients, 3))  # warm
            memory = psutil.Process(process.pid)
            before = memory.memory_info().rss / 2**20
            found, lost = asyncio.run(ask(url, args.clients, args.seconds))
            after = memory.memory_info().rss / 2**20
        times = sorted(seconds for _, seconds in found)
        rates[batch] = len(found) / args.seconds
        print(
            f"batches of up to {batch}: {rates[batch]:.0f} answers a second, "
            f"p50 {1e3 * statistics.median(times):.0f} ms, p99 {1e3 * times[int(len(times) * 0.99)]:.0f} ms, "
            f"statuses {dict(Counter(s for s, _ in found))}, "
            f"lost {len(lost)}, memory {before:.0f} -> {after:.0f} MiB",
            flush=True,
        )
    print(f"dynamic batching: {rates[16] / rates[1]:.2f} times the throughput of single images")


async def memory(args):
    with server(args.checkpoint) as (process, url):
        watched = psutil.Process(process.pid)
        asking = asyncio.create_task(ask(url, args.clients, args.seconds))
        start, curve = time.monotonic(), []
        while not asking.done():
            curve.append((round(time.monotonic() - start), round(watched.memory_info().rss / 2**20)))
            print(f"{curve[-1][0]} s: {curve[-1][1]} MiB", flush=True)
            await asyncio.wait([asking], timeout=10)
        found, lost = await asking
    half = [mib for seconds, mib in curve if seconds >= args.seconds / 2]
    print(f"{len(found)} answers, {len(lost)} lost; second half of the time: {half[0]} -> {half[-1]} MiB")


async def end(args):
    with server(args.checkpoint) as (process, url):
        asking = asyncio.create_task(ask(url, args.clients, 30))
        await asyncio.sleep(5)
        process.send_signal(signal.SIGTERM)
        found, lost = await asking
        status = await asyncio.get_running_loop().run_in_executor(None, process.wait)
    statuses = dict(Counter(s for s, _ in found))
    print(f"SIGTERM under load: {statuses} answered, {len(lost)} accepted but lost {lost[:3]}, exit status {status}")


@cache
def bomb(width):
    """A picture of more pixels than any memory, in some kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (width, 20_000)).save(buffer, "png")
    return buffer.getvalue()


def malformed_request(random_):
    """Draw a request with something wrong: content, type, headers, parameters, path or method."""
    good, text = png(seed=1), base64.b64encode(png(seed=1)).decode()
    cut = good[: random_.randrange(len(good))]
    flipped = bytearray(good)
    for _ in range(random_.randrange(1, 40)):
        flipped[random_.randrange(len(flipped))] = random_.randrange(256)
    noise = random_.randbytes(random_.randrange(2000))
    values = [None, 3, 1.5, True, "", "é", "====", text[:-7], text, [], {}, [text], [3], [[text]], {"image": text}]
    bodies = [
        (cut, "image/png"), (bytes(flipped), "image/png"), (noise, "image/jpeg"),
        (bomb(random_.choice([30_000, 60_000])), "image/png"),
        (png((2000, 3)), "image/png"), (b"", "image/gif"), (noise, "application/json"),
        (json.dumps(random_.choice(values)).encode(), "application/json"),
        (json.dumps({random_.choice(["image", "images", "x"]): random_.choice(values)}).encode(), "application/json"),
        (noise, "multipart/form-data; boundary=b"), (noise, "multipart/form-data"),
        (b"--b\r\n" + noise + b"\r\n--b--", "multipart/form-data; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n' + cut + b"\r\n--b--\r\n",
         "multipart/form-data; boundary=b"),
        (good, random_.choice(["text/html", "", "image", "/", "é".encode(), "application/xml"])),
    ]  # fmt: skip
    body, kind = random_.choice(bodies)
    headers = [(b"Content-Type", kind if isinstance(kind, bytes) else kind.encode())]
    if random_.random() < 0.05:
        headers.append((b"X-Long", b"a" * random_.choice([1000, 30_000, 70_000, 200_000])))
    path = random_.choice(["/predict"] * 12 + ["/predict?top=0", "/predict?top=x", "/predict?top=1e9", "/nope", "/%00"])
    return random_.choice(["POST"] * 12 + ["GET", "PUT", "DELETE", "BREW"]), path, headers, body


async def slow_bodies(url, count):
    """Send heads whose bodies never end; return the first lines of the answers."""
    host, port = url.rpartition("/")[2].split(":")

    async def one():
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc")
        await writer.drain()
        line = await asyncio.wait_for(reader.readline(), 30)
        writer.close()
        return int(line.split()[1])

    return await asyncio.gather(*(one() for _ in range(count)))


async def malformed(args):
    random_ = random.Random(0)
    statuses, silent, broken = Counter(), 0, 0
    with server(args.checkpoint, "--read_seconds", "2") as (process, url):
        async with httpx.AsyncClient(timeout=60) as session:
            slow = asyncio.create_task(slow_bodies(url, 50))
            for first in range(0, args.count, 16):
                drawn = [malformed_request(random_) for _ in range(min(16, args.count - first))]
                calls = [session.request(m, url + p, headers=h, content=b) for m, p, h, b in drawn]
                for answer in await asyncio.gather(*calls, return_exceptions=True):
                    if isinstance(answer, Exception):
                        broken += 1
                        continue
                    statuses[answer.status_code] += 1
                    told = answer.text if answer.status_code < 500 else ""
                    silent += not told
            statuses.update(await slow)
            healthy = (await session.get(f"{url}/health")).status_code
        alive = process.poll() is None
    print(
        f"{args.count} requests and 50 slow bodies: {dict(sorted(statuses.items()))}, {silent} without a word, "
        f"{broken} connections broken, server {'alive' if alive and healthy == 200 else 'DEAD'}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "memory", "malformed", "end"])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--count", type=int, default=10_000)
    args = parser.parse_args()
    if args.what == "load":
        load(args)
    else:
        asyncio.run({"memory": memory, "malformed": malformed, "end": end}[args.what](args))


if __name__ == "__main__":
    main()
