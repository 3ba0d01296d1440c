"""Engines that are killed while they save and load sessions: what the next one resumes is right; nothing is left."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kimi_vllm.cache.session_files import read_header
from kimi_vllm.cache.session_folder import sessions

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KILLS = int(os.environ.get("KIMI_TEST_KILLS", "4"))
CHATS = 24

ENGINE = """
import json, random, sys
from support.engine import RECALL, check_equal, completion, engine
from support.sessions import complete, counts, options, parameters

if __name__ == "__main__":
    folder, seed, texts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    rng = random.Random(seed)
    kimi = {"session_gib": 0.05, "session_prefix_tokens": 64 * (seed % 3 > 0)} if seed % 2 else {}
    with engine(RECALL, **options(folder, enable_prefix_caching=bool(seed % 3), kimi=kimi)) as running:
        print(json.dumps({"ready": True}), flush=True)
        while True:
            chats = rng.sample(sorted(texts), 12)
            for chat in chats:
                texts[chat] = texts[chat][-600:] if len(texts[chat]) < 600 else []
                texts[chat] += [rng.randrange(3, 100) for _ in range(rng.choice([1, 2, 65, 130]))]
            # Where prefixes without a name are kept, some have none.
            names = [{"load": chat, "save": chat} if rng.random() < 0.5 or not kimi else {} for chat in chats]
            lengths = [rng.choice([1, 7, 40]) for _ in chats]
            sampling = [parameters(length, **named) for length, named in zip(lengths, names, strict=True)]
            done = [completion(output) for output in complete(running, [texts[chat] for chat in chats], sampling)]
            sampling = [parameters(length, cold=True) for length in lengths]
            plain = complete(running, [one.prompt for one in done], sampling)
            for chat, one, cold in zip(chats, done, map(completion, plain), strict=True):
                check_equal(one, cold)
                texts[chat] += one.tokens
                print(json.dumps({"chat": chat, "text": texts[chat], "cached": one.cached}), flush=True)
            print(json.dumps({"counts": dict(counts(running))}), flush=True)
"""


@pytest.mark.timeout(120 + 90 * KILLS)
def test_no_kill_makes_an_answer_wrong_or_leaves_a_file(tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    folder = tmp_path / "sessions"
    folder.mkdir()
    rng = random.Random(1)
    texts = {f"chat{number}": [] for number in range(CHATS)}
    answers = resumed = 0
    for kill in range(KILLS + 1):
        started = subprocess.Popen(
            [sys.executable, str(script), str(folder), str(kill), json.dumps(texts)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONPATH": "tests:.", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        )
        killer = threading.Timer(300, started.kill)
        killer.start()
        for line in started.stdout:
            told = json.loads(line) if line.startswith("{") else {}
            if "ready" in told:
                assert not [path for path in folder.iterdir() if path.name.startswith(".")], "of a killed process"
                killer.cancel()
                killer = threading.Timer(rng.uniform(0.2, 12), started.kill)  # in the middle of anything
                killer.start()
            if "chat" in told:
                texts[told["chat"]] = told["text"]
                answers += 1
                resumed += bool(told["cached"])
        killer.cancel()
        assert started.wait() == -signal.SIGKILL, "it has ended by itself: an answer was wrong"
        for session in sessions(folder):
            for path in session.files.values():
                read_header(path)  # every file that has its name is whole
    assert answers > KILLS
    assert resumed
    sys.stdout.write(f"{KILLS + 1} engines killed, {answers} answers, {resumed} of them resumed\n")
