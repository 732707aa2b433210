// ResponseType 0: Node's fetch, one after the other and all at once. Arguments: URL of the agent, token.
import assert from "node:assert/strict";
const [agent, token] = process.argv.slice(2);
const headers = { "X-KMS-Token": token };
const get = async (path, options = {}) => {
  const reply = await fetch(agent + path, { headers, signal: AbortSignal.timeout(15_000), ...options });
  return [reply.status, await reply.text()];
};
const secret = async (path) => JSON.parse((await get(path))[1]).SecretData;
for (let number = 0; number < 50; number++) {
  assert.equal(await secret("/secretsmanager/get?secretId=a"), "1");
  assert.deepEqual(await get("/ping"), [200, "healthy"]);
}
const all = await Promise.all(Array.from({ length: 100 }, () => secret("/v1/a")));
assert.deepEqual(new Set(all), new Set(["1"]));
assert.equal(await secret("/v1/" + encodeURIComponent("team/k\u00e4se +1")), "gr\u00fcn");
assert.equal((await get("/v1/missing"))[0], 404);
assert.equal((await get("/v1/a", { headers: {} }))[0], 403);
assert.deepEqual(await get("/v1/a", { method: "HEAD" }), [200, ""]);
assert.equal((await get("/v1/a", { method: "POST", body: "x".repeat(100_000) }))[0], 405);
assert.equal((await get("/v1/a", { method: "PUT" }))[0], 405);
assert.equal(await secret("/v1/a"), "1");
console.log("ok");
