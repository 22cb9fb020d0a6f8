"""The Lua scripts that make a write to Redis atomic, for documents as JSON strings and as hashes.

Each is a few functions that know the format, and a loop that knows the rules. Versions are text of 19 digits, because
Lua's numbers are doubles; such text compares like the numbers. Every key that a script touches is in its KEYS.
"""

from __future__ import annotations

from typing import NamedTuple

ZERO = b"0" * 19  # below every version
ABOVE_ALL = b"9" * 19  # above every version

_JSON = """
local sub, match = string.sub, string.match

-- The version of a document, false without one (nothing there, or a string that Delta did not write), nil for a key of
-- another type. 33 bytes hold it, so a large document is not copied.
local function stored(key)
  local head = redis.pcall('GETRANGE', key, 0, 32)
  if type(head) == 'table' then return nil end
  return #head == 33 and match(head, '^{"_version":"(%d+)"$') or false
end

-- A write is one argument: a document, or for a delete its version alone.
local function take(at)
  local given = ARGV[at]
  if #given == 19 then return given, false, at + 1 end
  return sub(given, 14, 32), true, at + 1
end

-- What does not expire is written by one command in the end: a call from Lua costs more than its work. No key is among
-- a call's twice, so what is compared is what is there.
local rest, resting = {}, 0
local function put(key, version, at, ttl)
  if ttl > 0 then
    redis.call('SET', key, ARGV[at], 'PX', ttl)
  else
    rest[resting + 1], rest[resting + 2] = key, ARGV[at]
    resting = resting + 2
  end
end

local function put_rest()
  if resting > 0 then redis.call('MSET', unpack(rest)) end
end

local function content(key)
  local value = redis.pcall('GET', key)
  return type(value) ~= 'table' and value
end
"""

_HASH = """
local match = string.match

local function stored(key)
  local version = redis.pcall('HGET', key, '_version')
  if type(version) == 'table' then return nil end
  return version and #version == 19 and match(version, '^%d+$') or false
end

-- A write is its version, the number of arguments that follow (-1: a delete), and so many of fields and values.
local function take(at)
  local count = tonumber(ARGV[at + 1])
  if count < 0 then return ARGV[at], false, at + 2 end
  return ARGV[at], true, at + 2 + count
end

local function put(key, version, at, ttl)
  redis.call('UNLINK', key)
  redis.call('HSET', key, '_version', version)
  local last = at + 1 + tonumber(ARGV[at + 1])
  for first = at + 2, last, 1000 do  -- unpack is limited by Lua's stack, 8000 values
    redis.call('HSET', key, unpack(ARGV, first, math.min(first + 999, last)))
  end
  if ttl > 0 then redis.call('PEXPIRE', key, ttl) end
end

local function put_rest() end

local function content(key)
  local value = redis.pcall('HGETALL', key)
  return not value.err and value
end
"""

# KEYS: the floor's, unless their number is even; then each document's and its tombstone's. ARGV: how long a tombstone
# lives and a document (ms; 0: for ever), '1' to keep the version beside a document, the floor if it is not in KEYS;
# then the writes. Returns a byte for each write: a(pplied), s(tale) or w(rong type).
_WRITE = """
local tombstone_ms, ttl_ms, keep = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1'
local first, zero = #KEYS % 2, '0000000000000000000'
local floor = first == 1 and (redis.call('GET', KEYS[1]) or zero) or ARGV[4]
-- Where nothing is there yet, as in a load, one command says so of all. The first document tells whether to ask.
local nothing = #KEYS > 3 and redis.call('EXISTS', KEYS[first + 1]) == 0
  and redis.call('EXISTS', unpack(KEYS, first + 1)) == 0
local outcomes, unearthed, count, at = {}, {}, 0, 5
for i = first + 1, #KEYS, 2 do
  local key, tombstone, begin = KEYS[i], KEYS[i + 1], at
  local version, upsert
  version, upsert, at = take(at)
  local current, buried = zero, false
  if not nothing then
    current = stored(key)
    if current == false then
      -- A document's version is never below its tombstone's, so this is asked only where there is none.
      buried = redis.call('GET', tombstone)
      current = buried or zero
    end
  end
  count = count + 1
  if current == nil then
    outcomes[count] = 'w'
  elseif version < floor or version < current then
    outcomes[count] = 's'
  elseif upsert then
    put(key, version, begin, ttl_ms)
    if keep then
      redis.call('SET', tombstone, version, 'PX', tombstone_ms)
    elseif buried then
      unearthed[#unearthed + 1] = tombstone
    end
  else
    redis.call('SET', tombstone, version, 'PX', tombstone_ms)
    redis.call('UNLINK', key)
  end
end
put_rest()
-- Not before what outranks them is there: Redis may refuse to write it, for its memory is full or the user may not.
if #unearthed > 0 then redis.call('UNLINK', unpack(unearthed)) end
if next(outcomes) == nil then return string.rep('a', count) end
for i = 1, count do outcomes[i] = outcomes[i] or 'a' end
return table.concat(outcomes)
"""

# KEYS: each document's and its tombstone's. Returns for each what is there, false for nothing.
_READ = """
local found = {}
for i = 1, #KEYS, 2 do
  found[i] = content(KEYS[i])
  found[i + 1] = redis.call('GET', KEYS[i + 1])
end
return found
"""

# KEYS: documents'. Returns their versions, false where there is no document.
_VERSIONS = """
local versions = {}
for i = 1, #KEYS do versions[i] = stored(KEYS[i]) or false end
return versions
"""

# KEYS: any strings. Returns what they hold, false for one that is not there.
VALUES = """
local values = {}
for i = 1, #KEYS do values[i] = redis.call('GET', KEYS[i]) end
return values
"""

# KEYS: documents'; ARGV: a version. Deletes those that are older, and returns how many that were.
_REMOVE = """
local removed = 0
for i = 1, #KEYS do
  local current = stored(KEYS[i])
  if current and current < ARGV[1] then removed = removed + redis.call('UNLINK', KEYS[i]) end
end
return removed
"""

# KEYS: a document's and its tombstone's; ARGV: a version. Deletes what has exactly that version. A document without one
# is no obstacle to any write, so it may stay.
_DISCARD = """
if stored(KEYS[1]) == ARGV[1] then redis.call('UNLINK', KEYS[1]) end
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('UNLINK', KEYS[2]) end
"""

# KEYS: a floor's, and in a cluster that of the time it was raised; ARGV: a version and that time. Raises the floor.
RAISE_FLOOR = """
local floor = redis.call('GET', KEYS[1])
if not floor or floor < ARGV[1] then redis.call('SET', KEYS[1], ARGV[1]) end
if KEYS[2] then redis.call('SET', KEYS[2], ARGV[2]) end
"""

# KEYS: any; ARGV: what it held. Deletes it if it still does.
FORGET = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('UNLINK', KEYS[1]) end
"""

# KEYS: of two keys that are not there. Runs every command that the others need and that can be run without a trace.
PROBE = """
redis.call('GET', KEYS[1])
redis.call('GETRANGE', KEYS[1], 0, 0)
redis.call('HGET', KEYS[1], '_version')
redis.call('HGETALL', KEYS[1])
redis.call('EXISTS', KEYS[1])
redis.call('SET', KEYS[1], '', 'XX')
redis.call('PEXPIRE', KEYS[1], 1)
redis.call('SET', KEYS[2], '', 'XX')
redis.call('UNLINK', KEYS[1], KEYS[2])
local odd = redis.pcall('MSET', KEYS[1], '', KEYS[2])  -- refused before anything is written
if not string.find(odd.err, 'wrong number of arg', 1, true) then return odd end
"""


class Scripts(NamedTuple):
    """The scripts for one format."""

    write: str
    read: str
    versions: str
    remove: str
    discard: str


JSON = Scripts(_JSON + _WRITE, _JSON + _READ, _JSON + _VERSIONS, _JSON + _REMOVE, _JSON + _DISCARD)
HASH = Scripts(_HASH + _WRITE, _HASH + _READ, _HASH + _VERSIONS, _HASH + _REMOVE, _HASH + _DISCARD)
