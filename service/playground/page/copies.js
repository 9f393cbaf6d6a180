// The call that made what is shown, as people would write it elsewhere.

import { address, key } from "./api.js";

const SERVICE = {
  classify: ["ClassifierServiceStub", "Classify", "ClassifyRequest"],
  detect: ["DetectorServiceStub", "Detect", "DetectRequest"],
  segment: ["SegmenterServiceStub", "Segment", "SegmentRequest"],
};

// The key itself is never written out: commands end up in histories and chats.
export const COPIES = { curl, Python: python, gRPC: grpc };

function curl(call) {
  const lines = [
    `curl -sS --data-binary @${shell(call.fileName)}`,
    `-H 'Content-Type: ${call.mediaType}'`,
    ...(key.get() ? ['-H "Authorization: Bearer $DAT_KEY"'] : []),
    shell(address(call.path)),
  ];
  return lines.join(" \\\n  ");
}

function python(call) {
  const keyed = Boolean(key.get());
  const headers = [`"Content-Type": ${text(call.mediaType)}`];
  if (keyed) headers.push('"Authorization": f"Bearer {os.environ[\'DAT_KEY\']}"');
  return [
    "import json",
    ...(keyed ? ["import os"] : []),
    "from urllib.request import Request, urlopen",
    "",
    `url = ${text(address(call.path))}`,
    `headers = {${headers.join(", ")}}`,
    `with open(${text(call.fileName)}, "rb") as file:`,
    "    request = Request(url, file.read(), headers)",
    "with urlopen(request) as response:",
    "    answer = json.load(response)",
    "print(json.dumps(answer, indent=2))",
  ].join("\n");
}

function grpc(call, facts) {
  const [stub, method, message] = SERVICE[call.task];
  const secure = location.protocol === "https:";
  const target = text(`${location.hostname}:${facts.grpc_port || 8001}`);
  const keyed = Boolean(key.get());
  const channel = secure
    ? `grpc.secure_channel(${target}, grpc.ssl_channel_credentials())`
    : `grpc.insecure_channel(${target})`;
  return [
    "import grpc",
    ...(keyed ? ["import os"] : []),
    "from google.protobuf.json_format import MessageToJson",
    "from service.pb import dat_pb2, dat_pb2_grpc",
    "",
    `with open(${text(call.fileName)}, "rb") as file:`,
    `    request = dat_pb2.${message}(`,
    "        images=[file.read()],",
    ...grpcOptions(call.options).map((line) => `        ${line}`),
    "    )",
    `with ${channel} as channel:`,
    `    stub = dat_pb2_grpc.${stub}(channel)`,
    keyed
      ? `    answer = stub.${method}(request, metadata=[("x-api-key", os.environ["DAT_KEY"])])`
      : `    answer = stub.${method}(request)`,
    "print(MessageToJson(answer))",
  ].join("\n");
}

function grpcOptions(options) {
  const lines = [`model=${text(options.model)},`];
  for (const name of ["top_k", "score_threshold"]) {
    if (name in options) lines.push(`${name}=${options[name]},`);
  }
  if (options.format) lines.push(`format="SEGMENT_FORMAT_${options.format.toUpperCase()}",`);
  lines.push(`explain="EXPLAIN_${options.explain.toUpperCase()}",`);
  if (options.explain !== "attention") return lines;
  lines.push("attention=dat_pb2.AttentionOptions(");
  if (options.queries) {
    const positions = options.queries.map(([x, y]) => `dat_pb2.Position(x=${x}, y=${y})`);
    lines.push(`    queries=[${positions.join(", ")}],`);
  }
  if (options.layers) {
    const layers = options.layers
      .map((name) => name.split("."))
      .map(([stage, block]) => `dat_pb2.LayerName(stage=${stage}, block=${block})`);
    lines.push(`    layers=[${layers.join(", ")}],`);
  }
  lines.push(`    top_n=${options.top_n},`, "),");
  return lines;
}

// JSON's strings are strings of Python too.
function text(value) {
  return JSON.stringify(value);
}

function shell(value) {
  return `'${value.replaceAll("'", "'\\''")}'`;
}
