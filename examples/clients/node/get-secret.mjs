#!/usr/bin/env node
// Asks kms-agent for a secret and prints its value:  node get-secret.mjs NAME
//
// Node 18 or newer, nothing else. The token: KMS_TOKEN (the token itself, or file:///path), else the file
// /var/run/kmstoken. The agent: KMS_AGENT, else http://localhost:2025.
import { readFile } from "node:fs/promises";

// The token is read for each request: it may be rotated while a program runs.
async function token() {
  const value = process.env.KMS_TOKEN ?? "file:///var/run/kmstoken";
  return (value.startsWith("file://") ? await readFile(new URL(value), "utf8") : value).trim();
}

// fetch keeps its connection for the next request, and uses no proxy, which would learn both token and secret.
export async function getSecret(name) {
  const agent = process.env.KMS_AGENT ?? "http://localhost:2025";
  const reply = await fetch(`${agent}/secretsmanager/get?${new URLSearchParams({ secretId: name })}`, {
    headers: { "X-KMS-Token": await token() },
    signal: AbortSignal.timeout(15_000),
  });
  if (!reply.ok) {
    // The body says why: {"Code": .., "Message": .., "RequestId": ..}
    throw new Error(`${reply.status} ${await reply.text()}`);
  }
  return (await reply.json()).SecretData;
}

if (process.argv.length !== 3) {
  console.error("usage: node get-secret.mjs NAME");
  process.exit(2);
}
try {
  console.log(await getSecret(process.argv[2]));
} catch (error) {
  console.error(error.cause?.message ?? error.message);
  process.exitCode = 1;
}
