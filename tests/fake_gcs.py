"""Google Cloud Storage's JSON API as far as gcsfs speaks it, in memory.

`STORAGE_EMULATOR_HOST` points a process at it. Objects have generations, and `ifGenerationMatch=0`
creates only what is absent.
"""

import email
import email.policy
import http.server
import json
import threading
import urllib.parse


class FakeGcs:
  """Attributes: objects ((bucket, name) -> (generation, content)), buckets, host (for the
  environment), answers_to_lose (of uploads that are done all the same), read_only, forbidden."""

  def __init__(self, *buckets: str):
    self.buckets, self.objects, self.answers_to_lose = set(buckets), {}, 0
    self.read_only = self.forbidden = False
    self.lock, self._uploads, self._generation = threading.Lock(), {}, 0
    self._server = http.server.ThreadingHTTPServer(("localhost", 0), _handler(self))
    self._server.daemon_threads = True
    self._server.handle_error = lambda *_: None  # gcsfs hangs up where one of two answers will do
    self.host = f"http://localhost:{self._server.server_port}"
    threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

  def close(self) -> None:
    self._server.shutdown()
    self._server.server_close()

  def put(self, bucket: str, name: str, content: bytes, query: dict) -> tuple[int, dict]:
    """(HTTP status, answer) of an upload."""
    if bucket not in self.buckets:
      return 404, {"error": {"message": "The specified bucket does not exist."}}
    if self.read_only:
      return 403, {"error": {"message": "does not have storage.objects.create access"}}
    if query.get("ifGenerationMatch") == "0" and (bucket, name) in self.objects:
      return 412, {"error": {"message": "At least one of the pre-conditions did not hold."}}
    self._generation += 1
    self.objects[bucket, name] = self._generation, content
    if self.answers_to_lose:
      self.answers_to_lose -= 1
      return 503, {"error": {"message": "try again"}}
    return 200, self.describe(bucket, name)

  def begin(self, bucket: str, name: str, query: dict) -> str:
    """Of an upload in pieces: where they go."""
    key = str(len(self._uploads))
    self._uploads[key] = bucket, name, query, bytearray()
    return f"{self.host}/resumable/{key}?upload_id={key}&padding=for-a-long-location"

  def go_on(self, key: str, content: bytes, total: str) -> tuple[int, dict]:
    """A piece; `total` is `*` while more follow."""
    bucket, name, query, parts = self._uploads[key]
    parts += content
    return (308, {}) if total == "*" else self.put(bucket, name, bytes(parts), query)

  def describe(self, bucket: str, name: str) -> dict:
    generation, content = self.objects[bucket, name]
    return {"kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(content)),
            "generation": str(generation), "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z"}

  def list(self, bucket: str, prefix: str, delimiter: str) -> dict:
    items, prefixes = [], set()
    for owner, name in sorted(self.objects):
      if owner == bucket and name.startswith(prefix):
        head, found, _ = name[len(prefix):].partition(delimiter) if delimiter else (name, "", "")
        if found:
          prefixes.add(prefix + head + delimiter)
        else:
          items.append(self.describe(bucket, name))
    return {"items": items, "prefixes": sorted(prefixes)}


def _handler(store: FakeGcs) -> type:
  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *_):
      pass

    def _serve(self):
      body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
      url = urllib.parse.urlsplit(self.path)
      query = dict(urllib.parse.parse_qsl(url.query))
      words = [urllib.parse.unquote(word) for word in url.path.strip("/").split("/")]
      with store.lock:
        self._answer(*self._route(words, query, body))

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _route(self, words, query, body):
      """(status, content, headers)"""
      if store.forbidden:
        return 403, {"error": {"message": "does not have storage.objects.get access"}}, {}
      if words[0] == "resumable":
        total = self.headers.get("Content-Range", "").rpartition("/")[2]
        return *store.go_on(words[1], body, total), {}
      bucket = words[words.index("b") + 1]
      name = words[words.index("o") + 1] if words[-1] != "o" and "o" in words else None
      if words[0] == "upload":
        return self._upload(bucket, query, body)
      if name is None:
        if bucket not in store.buckets:
          return 404, {"error": {"message": "The specified bucket does not exist."}}, {}
        if words[-1] == "o":
          return 200, store.list(bucket, query.get("prefix", ""), query.get("delimiter", "")), {}
        return 200, {"name": bucket, "location": "US-EAST5"}, {}
      if (bucket, name) not in store.objects:
        return 404, {"error": {"message": f"No such object: {bucket}/{name}"}}, {}
      if self.command == "DELETE":
        del store.objects[bucket, name]
        return 204, b"", {}
      if query.get("alt") != "media":
        return 200, store.describe(bucket, name), {}
      generation, content = store.objects[bucket, name]
      headers = {"x-goog-generation": str(generation)}
      if wanted := self.headers.get("Range"):
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        first, last = int(first), min(int(last or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, content[first:last + 1], headers
      return 200, content, headers

    def _upload(self, bucket, query, body):
      if query["uploadType"] == "media":  # tensorstore's
        return *store.put(bucket, query["name"], body, query), {}
      if query["uploadType"] == "resumable":
        return 200, {}, {"Location": store.begin(bucket, query["name"], query)}
      head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
      message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
      about, content = (part.get_payload(decode=True) for part in message.iter_parts())
      return *store.put(bucket, json.loads(about)["name"], content, query), {}

    def _answer(self, status, content, headers):
      if isinstance(content, dict):
        content = json.dumps(content).encode()
      self.send_response(status)
      for name, value in {**headers, "Content-Length": str(len(content))}.items():
        self.send_header(name, value)
      self.end_headers()
      self.wfile.write(content)

  return Handler
