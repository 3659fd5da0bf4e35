// The Vercel AI SDK with @ai-sdk/openai-compatible; see ways.py for what the scripts of this folder have in common.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import assert from "node:assert/strict";
import { z } from "zod";

const { LFM_BASE_URL, LFM_API_KEY, LFM_MODEL } = process.env;
const provider = createOpenAICompatible({
  name: "lfm", baseURL: LFM_BASE_URL, apiKey: LFM_API_KEY, includeUsage: true, supportsStructuredOutputs: true,
});
const shared = { model: provider(LFM_MODEL), maxRetries: 0, maxOutputTokens: 200 };
const city = z.enum(["Paris", "Oslo"]);
const Report = z.object({ city, warm: z.boolean() });
const tools = {
  weather: tool({
    description: "The weather of a city.", inputSchema: z.object({ city }),
    execute: async ({ city }) => `It rains in ${city}.`,
  }),
};
// The first step must call, the others may.
const loop = {
  tools, stopWhen: stepCountIs(4),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "auto" }),
};
const prompt = "What is the weather in Paris?";
const onError = ({ error }) => { throw error; };

const ways = {
  async chat() {
    const answer = await generateText({ ...shared, instructions: "Be short.", prompt });
    assert(answer.text);
    assert(answer.usage.outputTokens > 0);
  },
  async stream() {
    const answer = streamText({ ...shared, prompt, onError });
    let parts = 0;
    for await (const text of answer.textStream) parts += text.length > 0;
    assert(parts > 1);
    assert((await answer.usage).outputTokens > 0);
  },
  async completion() {
    assert((await generateText({ ...shared, model: provider.completionModel(LFM_MODEL), prompt: "hello" })).text);
  },
  async tools() {
    const answer = await generateText({ ...shared, ...loop, prompt });
    assert.equal(answer.steps.length, 2);
    assert(answer.steps[0].toolResults.length > 0);
    assert(answer.text);
  },
  async tools_streamed() {
    const answer = streamText({ ...shared, ...loop, prompt, onError });
    const seen = new Set();
    for await (const part of answer.fullStream) seen.add(part.type);
    assert(seen.has("tool-call") && seen.has("tool-result") && seen.has("text-delta"), [...seen].join());
    assert.equal((await answer.steps).length, 2);
  },
  async structured() {
    Report.parse((await generateText({ ...shared, prompt, output: Output.object({ schema: Report }) })).output);
    const streamed = streamText({ ...shared, prompt, output: Output.object({ schema: Report }), onError });
    for await (const part of streamed.partialOutputStream) assert(part);
    Report.parse(await streamed.output);
  },
  async structured_array() {
    const answer = await generateText({ ...shared, prompt, output: Output.array({ element: Report }) });
    z.array(Report).parse(answer.output);
  },
  async tools_and_structured() {
    const answer = await generateText({ ...shared, ...loop, prompt, output: Output.object({ schema: Report }) });
    assert(answer.steps[0].toolResults.length > 0);
    Report.parse(answer.output);
  },
};

for (const [name, way] of Object.entries(ways)) {
  const told = { way: name.replaceAll("_", " "), ok: true };
  try {
    await way();
  } catch (error) {
    console.error(error);
    Object.assign(told, { ok: false, error: `${error.name}: ${error.message}`.slice(0, 2000) });
  }
  console.log(JSON.stringify(told));
}
