'use strict';
// One deployment for the tests of a file; what it logged is shown where a test fails.

const { test, describe, before, after } = require('node:test');
const { World } = require('../../clients/lib/suite.js');
const { Deployment } = require('./deployment.js');
const { systemctl } = require('./systemd.js');

/**
 * A group of tests. `define` gets `scenario(name, async (world) => …)`, and `deployment()` for what is
 * the same in all of them. A test may harm what it likes, but leaves everything running. With `bare`
 * among the options the tests install Banter themselves, and build upon each other.
 */
function suite(title, options, define) {
  describe(title, () => {
    const deployment = new Deployment(options);
    if (!options.bare) {
      before(() => deployment.install(), { timeout: 60_000 });
      after(() => systemctl('stop', 'banter.target'), { timeout: 30_000 });
    }
    const scenario = (name, body, { timeout = 120_000 } = {}) => {
      test(name, { timeout }, async () => {
        const world = new World(deployment);
        try {
          await body(world);
        } catch (error) {
          console.error(`--- the journal, after "${name}" failed:\n${await deployment.tail()}\n---`);
          throw error;
        } finally {
          world.close();
        }
      });
    };
    define(scenario, () => deployment);
  });
}

module.exports = { suite };
